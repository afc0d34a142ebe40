"""The journal of a helper. Helpers are all processes of an export except the first, which writes the manifest."""

import os
from collections.abc import Iterable

from visionattn.overlays.folder.manifest import JOURNAL, Entry, LineFile, encode


class Journal:
    """Records the entries of one helper, and its promises (see `Manifest`). `Manifest.take_in` moves both into the
    manifest.

    The first process deletes the journal when it stops waiting for the helper. If the first process was killed before
    that, the first process of the next run deletes the journal. After that, writing to the journal fails, so the helper
    can write no further output.

    Args:
        out: the output folder; it is created with the first line.
        rank: rank of the process, > 0.
    """

    def __init__(self, out: str, rank: int) -> None:
        self.path = os.path.join(out, f"{JOURNAL}{rank}")
        self._lines = LineFile(self.path)

    def promise(self, outputs: Iterable[tuple[str, str]], fingerprint: str) -> None:
        """Record outputs that are about to be written, as `Manifest.promise` does."""
        self._lines.append(b"".join(encode([*pair, fingerprint]) for pair in outputs))

    def secure(self) -> None:
        """Wait until the promises are on disk, as `Manifest.secure` does."""
        self._lines.sync()

    def add(self, entry: Entry) -> None:
        """Write the line of one image, as `Manifest.add` does."""
        self._lines.append(encode(entry.to_dict()))

    def close(self) -> None:
        """Close the file, which the first process reads and deletes."""
        self._lines.close()
