"""Files that a kill, a full disk or a power cut cannot spoil: written beside their place, then moved there.

Lightning stages checkpoints in the system's folder for temporary files. Where that is another file system, the move is
a copy, and what dies in the middle of it leaves half a checkpoint, and the one before is gone.
"""

import contextlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from visionattn.errors import DataError


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written by `replace`: whatever happens, a whole one stands under the name."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: "str | os.PathLike[str]", storage_options: Any | None = None
    ) -> None:
        replace(path, partial(torch.save, checkpoint))


def replace(path: "str | os.PathLike[str]", fill: Callable[[BinaryIO], None]) -> None:
    """Write a file so that its name always belongs to a whole one, the earlier or the new.

    The new one grows beside it as `.NAME.part`, goes to the disk, and takes the name. What a killed process leaves of
    it the next one writes over.

    Raises:
        DataError: it cannot be written; the earlier one is whole, and no part is left.
    """
    target = os.path.abspath(os.fspath(path))
    folder, name = os.path.split(target)
    part = os.path.join(folder, f".{name}.part")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(part, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
        _sync_folder(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        reason = _os_error(error)
        if reason is None:
            raise
        raise DataError(f"{os.fspath(path)} cannot be written: {reason.strerror or reason}") from error


def _sync_folder(folder: str) -> None:
    """The new name too goes to the disk, where the system can be asked for that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _os_error(error: BaseException) -> OSError | None:
    """torch.save tells of a full disk by a RuntimeError about positions, in whose context the reason stands."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__context__
    return seen if seen is not error or isinstance(error, OSError) else None
