"""What a process notes that shares an export, until the first process takes it into the manifest."""

import io
import os
from collections.abc import Iterable
from typing import Any

from visionattn.overlays.folder.manifest import JOURNAL, append, encode, writing


class Journal:
    """What a process that shares an export notes, until the first one takes it into the manifest.

    Args:
        out: the folder; it is made with the first line.
        rank: of the process, > 0.
    """

    def __init__(self, out: str, rank: int) -> None:
        self.path = os.path.join(out, f"{JOURNAL}{rank}")
        self._file: io.FileIO | None = None

    def promise(self, outputs: Iterable[tuple[str, str]], recipe: str) -> None:
        """As `Manifest.promise`."""
        self._write(b"".join(encode([*pair, recipe]) for pair in outputs))

    def secure(self) -> None:
        """As `Manifest.secure`."""
        if self._file is not None:
            with writing(self.path):
                os.fsync(self._file.fileno())

    def add(self, entry: dict[str, Any]) -> None:
        """As `Manifest.add`."""
        self._write(encode(entry))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, lines: bytes) -> None:
        with writing(self.path):
            if self._file is None:
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  # closed in `close`
            append(self._file, lines)
