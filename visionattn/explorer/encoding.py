"""Numbers as a web page carries them: few levels, deflated, base64. No torch.

Shapes: R rows, K values of a row.
"""

import base64
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVELS = (256, 64, 32, 16, 12, 10, 8, 6, 5, 4, 3)
"""What the values of a row may be rounded to, the finest first."""

_STEPS = 2048  # in which a row's top doubles
_NONE = 65_535  # of a row that is all zero, or nearly: 2^−32
_KINDS = ("u1", "i1", "u2", "i4", "f4")


@dataclass(frozen=True)
class Rows:
    """Rows of non-negative values, each between its own bounds, on the way to fewer levels.

        value = low + code / (levels − 1) · (high − low)        high = 2^(−top / 2048), low = high · base / 256

    Bounds are rounded outwards: `high − low` is what the row spans and at most 0.5 % of its largest value more.

    A value is off by at most half a level, a level being (high − low) / (levels − 1).

    Attributes:
        top: (R,) uint16.
        base: (R,) uint8.
        share: (R, K) uint16, the place of each value between its bounds, 65,535 for the upper.
    """

    top: NDArray[np.uint16]
    base: NDArray[np.uint8]
    share: NDArray[np.uint16]

    @classmethod
    def of(cls, values_RK: NDArray[np.floating]) -> "Rows":
        """Take rows of values in [0, 1]."""
        values_RK = np.asarray(values_RK, np.float32)
        most_R, least_R = values_RK.max(1), values_RK.min(1)
        steps_R = -_STEPS * np.log2(np.clip(most_R, 2.0**-40, 1), dtype=np.float64)
        top_R = np.minimum(np.floor(steps_R + 1e-3), _NONE).astype(np.uint16)
        high_R = high(top_R)
        ratio_R = np.divide(least_R, high_R, out=np.zeros_like(high_R), where=high_R > 0)
        base_R = np.clip(np.floor(256 * ratio_R), 0, 255).astype(np.uint8)
        low_R = high_R * base_R / 256
        span_R1 = np.maximum(high_R - low_R, np.float32(1e-12))[:, None]
        share_RK = np.clip((values_RK - low_R[:, None]) / span_R1, 0, 1)
        share_RK[top_R == _NONE] = 0
        return cls(top_R, base_R, np.rint(65_535 * share_RK).astype(np.uint16))

    def add_to(self, pack: "Pack", levels: int) -> dict[str, Any]:
        """Say in a pack what they are."""
        told = {"levels": levels, "length": self.share.shape[1], "top": pack.add(self.top), "base": pack.add(self.base)}
        codes_RK = np.rint(self.share * np.float32((levels - 1) / 65_535)).astype(np.int16)
        return {**told, "codes": pack.add(_together(codes_RK, levels))}


def _together(codes: NDArray[np.int16], levels: int) -> NDArray[np.uint8]:
    """As many codes in a byte as fit: the first is the remainder by `levels`."""
    each = together(levels)
    flat = codes.astype(np.uint8).ravel()
    parts = np.pad(flat, (0, -len(flat) % each)).reshape(-1, each)
    whole = parts[:, 0].copy()
    for turn in range(1, each):
        whole += parts[:, turn] * np.uint8(levels**turn)
    return whole


def high(top: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The upper bounds."""
    return np.where(top == _NONE, 0, np.exp2(-top.astype(np.float64) / _STEPS)).astype(np.float32)


def together(levels: int) -> int:
    """How many codes of so many levels fit into a byte."""
    count = 1
    while levels ** (count + 1) <= 256:
        count += 1
    return count


class Pack:
    """Arrays one behind the other; `add` says where each lies, as JSON can hold it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._length = 0

    def add(self, array: NDArray[Any]) -> dict[str, Any]:
        """Append int8, uint8, uint16, int32 or float32 numbers."""
        kind = f"{array.dtype.kind}{array.dtype.itemsize}"
        assert kind in _KINDS
        content = np.ascontiguousarray(array, f"<{kind}").tobytes()
        self._parts.append(content)
        self._length += len(content)
        return {"at": self._length - len(content), "kind": kind, "shape": list(array.shape)}

    @cached_property
    def text(self) -> str:
        """All of it, deflated, in base64; nothing is added any more."""
        return base64.b64encode(zlib.compress(b"".join(self._parts), 9)).decode()
