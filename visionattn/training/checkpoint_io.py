"""Write checkpoints atomically, so that a kill, a full disk or a power cut cannot damage them; read .safetensors too.

Lightning writes a checkpoint into the system's folder for temporary files and then moves the file. If that folder is on
another file system, the move is a copy. A process that dies during the copy leaves an incomplete checkpoint, and the
earlier checkpoint is lost.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from visionattn.files import write_file
from visionattn.training.checkpoints import SAFETENSORS, read


class DurableCheckpointIO(TorchCheckpointIO):
    """Write Lightning's checkpoints atomically: a file under its final name is always complete.

    A .safetensors file that `export` has written is read as a checkpoint without the state of a training.
    """

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint; the other arguments are those of Lightning's class.

        Raises:
            DataError: the .safetensors file cannot be read.
        """
        if os.fspath(path).endswith(SAFETENSORS):
            # Lightning changes checkpoints of older versions of Lightning, and requires the version
            return {"pytorch-lightning_version": L.__version__, **read(path)}
        return super().load_checkpoint(path, *args, **kwargs)

    def save_checkpoint(
        self, checkpoint: dict[str, object], path: "str | os.PathLike[str]", storage_options: object = None
    ) -> None:
        """Write a checkpoint; create its folder if necessary.

        Raises:
            DataError: the file cannot be written.
        """
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_file(path, partial(torch.save, checkpoint))
