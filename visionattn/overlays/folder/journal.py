"""The journal of a helper process of an export; the first process moves its entries into the manifest."""

import io
import os
from collections.abc import Iterable

from visionattn.overlays.folder.manifest import JOURNAL, Entry, append, encode, writing


class Journal:
    """The entries of a helper process of an export; `Manifest.take_in` moves them into the manifest.

    Args:
        out: the output folder; it is created with the first line.
        rank: of the process, > 0.
    """

    def __init__(self, out: str, rank: int) -> None:
        self.path = os.path.join(out, f"{JOURNAL}{rank}")
        self._file: io.FileIO | None = None

    def promise(self, outputs: Iterable[tuple[str, str]], fingerprint: str) -> None:
        """Record outputs that are about to be written, as `Manifest.promise`."""
        self._write(b"".join(encode([*pair, fingerprint]) for pair in outputs))

    def secure(self) -> None:
        """Wait until the promises are on disk, as `Manifest.secure`."""
        if self._file is not None:
            with writing(self.path):
                os.fsync(self._file.fileno())

    def add(self, entry: Entry) -> None:
        """Write the line of one image, as `Manifest.add`."""
        self._write(encode(entry.to_dict()))

    def close(self) -> None:
        """Close the file; it stays until the first process takes it in."""
        if self._file is not None:
            self._file.close()

    def _write(self, lines: bytes) -> None:
        with writing(self.path):
            if self._file is None:
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  # closed in `close`
            append(self._file, lines)
