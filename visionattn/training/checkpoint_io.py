"""Checkpoints that a kill, a full disk or a power cut cannot spoil.

Lightning stages checkpoints in the system's folder for temporary files. Where that is another file system, the move is
a copy, and a process that dies in the middle of it leaves half a checkpoint, and the one before is gone.
"""

import os
from functools import partial
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from visionattn.files import write_file


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written by `files.write_file`: whatever happens, a whole one stands under the name."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: "str | os.PathLike[str]", storage_options: Any | None = None
    ) -> None:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_file(path, partial(torch.save, checkpoint))
