"""Write checkpoints atomically, so that a kill, a full disk or a power cut cannot damage them.

Lightning writes a checkpoint into the system's folder for temporary files and then moves it. On another file system the
move is a copy: a process that dies during the copy leaves an incomplete checkpoint and has lost the earlier one.
"""

import os
from functools import partial

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from visionattn.files import write_file


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written by `files.write_file`: the name always belongs to a complete checkpoint."""

    def save_checkpoint(
        self, checkpoint: dict[str, object], path: "str | os.PathLike[str]", storage_options: object = None
    ) -> None:
        """Write a checkpoint and create its folder.

        Raises:
            DataError: the file cannot be written.
        """
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_file(path, partial(torch.save, checkpoint))
