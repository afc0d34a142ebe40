"""Encoding of arrays for a web page: rounded to few levels, compressed with zlib, in base64. No torch is imported.

Shapes: R rows, K values of a row.
"""

import base64
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

LEVELS = (256, 64, 32, 16, 12, 10, 8, 6, 5, 4, 3)
"""Numbers of levels that the values of a row can be rounded to, in descending order."""

_STEPS = 2048  # the upper bound of a row is 2^(−top / _STEPS)
_NONE = 65_535  # `top` of a row in which all values are below 2^−32
_KINDS = ("u1", "i1", "u2", "i4", "f4")


class Encoded(TypedDict):
    """An array in a pack, as JSON."""

    at: int
    kind: str
    shape: list[int]


@dataclass(frozen=True)
class Rows:
    """Rows of non-negative values before they are rounded to levels. Each row has its own bounds.

        value = low + code / (levels − 1) · (high − low)        high = 2^(−top / 2048), low = high · base / 256

    Bounds are rounded outwards: `high − low` exceeds the span of the row by at most 0.5 % of the row's largest value.
    The error of a value is at most half a level, where a level is (high − low) / (levels − 1).

    Attributes:
        top: (R,) uint16, which gives the upper bound.
        base: (R,) uint8, which gives the lower bound.
        share: (R, K) uint16, the position of each value between its bounds; 65,535 is the upper bound.
    """

    top: NDArray[np.uint16]
    base: NDArray[np.uint8]
    share: NDArray[np.uint16]

    @classmethod
    def of(cls, values_RK: NDArray[np.floating]) -> "Rows":
        """Make rows from values in [0, 1]."""
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

    def encode_into(self, pack: "EncodedArrays", levels: int) -> dict[str, object]:
        """Round the values to levels, add them to a pack, and return their description as JSON."""
        top, base = pack.add(self.top), pack.add(self.base)
        codes_RK = np.rint(self.share * np.float32((levels - 1) / 65_535)).astype(np.int16)
        codes = pack.add(_together(codes_RK, levels))
        return {"levels": levels, "length": self.share.shape[1], "top": top, "base": base, "codes": codes}


def _together(codes: NDArray[np.int16], levels: int) -> NDArray[np.uint8]:
    """Pack as many codes as fit into each byte, as digits to the base `levels`; the first code is the lowest digit."""
    each = together(levels)
    flat = codes.astype(np.uint8).ravel()
    parts = np.pad(flat, (0, -len(flat) % each)).reshape(-1, each)
    whole: NDArray[np.uint8] = parts[:, 0].copy()
    for turn in range(1, each):
        whole += parts[:, turn] * np.uint8(levels**turn)
    return whole


def high(top: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the upper bounds of rows."""
    return np.where(top == _NONE, 0, np.exp2(-top.astype(np.float64) / _STEPS)).astype(np.float32)


def together(levels: int) -> int:
    """Return how many codes, each in 0 … levels − 1, fit into a byte."""
    count = 1
    while levels ** (count + 1) <= 256:
        count += 1
    return count


class EncodedArrays:
    """A pack of arrays, stored one after the other."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._length = 0

    def add(self, array: NDArray[Any]) -> Encoded:  # any of `_KINDS`
        """Append an array of int8, uint8, uint16, int32 or float32; return its position, type and shape."""
        kind = f"{array.dtype.kind}{array.dtype.itemsize}"
        assert kind in _KINDS
        content = np.ascontiguousarray(array, f"<{kind}").tobytes()
        self._parts.append(content)
        self._length += len(content)
        return {"at": self._length - len(content), "kind": kind, "shape": list(array.shape)}

    @cached_property
    def text(self) -> str:
        """The whole pack, compressed with zlib, in base64. The result is cached, so add all arrays first."""
        return base64.b64encode(zlib.compress(b"".join(self._parts), 9)).decode()
