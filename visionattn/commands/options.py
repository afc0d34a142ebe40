"""What the verbs share: their parser, the options that name a model, and loading that model."""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from visionattn.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    from typing import NoReturn

    from torch import nn

    from visionattn.data import Preprocess

_RANDOM = "random"  # in place of a weights file


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours: one sentence, the nearest right name."""

    def error(self, message: str) -> "NoReturn":
        if message.startswith("unrecognized arguments: "):
            flag = message.removeprefix("unrecognized arguments: ").split()[0]
            message = f"{self.prog} has no option {flag}.{nearest(flag, self._option_string_actions)}"
        raise UsageError(message)


def add_model(parser: argparse.ArgumentParser) -> Any:
    """Returns the group of options of which one names the model."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", metavar="FILE", help="a checkpoint that visionattn fit wrote, or hf://OWNER/NAME")
    source.add_argument("--model", metavar="TIMM_NAME", help="a timm model")
    parser.add_argument(
        "--weights", metavar="FILE", help=f"weights for --model; those of the hub by default; {_RANDOM!r} for none"
    )
    return source


def load(options: argparse.Namespace) -> "tuple[nn.Module, Preprocess, Sequence[str]]":
    """The network that the options name, what its images need, and the names of its outputs."""
    if options.weights and not options.model:
        raise UsageError("--weights goes with --model; a checkpoint brings its own")
    if options.ckpt:
        return load_checkpoint(options.ckpt)
    import torch

    from visionattn.models.backbone import class_names_of, create_backbone, preprocess_of

    random = options.weights == _RANDOM
    torch.manual_seed(0)  # the same random weights every time, so that a run can be taken up again
    model = create_backbone(
        options.model, pretrained=not options.weights, weights=None if random else options.weights
    ).eval()
    return model.to(_device()), preprocess_of(model), () if random else class_names_of(model)


def load_checkpoint(path: str) -> "tuple[nn.Module, Preprocess, Sequence[str]]":
    """The network of a checkpoint, what its images need, and the names of its outputs."""
    from visionattn.training.checkpoints import load as load_task

    task: Any = load_task(path)
    if task.preprocess is None:
        raise DataError(f"{path} does not say how its images are prepared")
    return task.network.to(_device()), task.preprocess, task.class_names


def _device() -> str:
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % count}" if count else "cpu"


def method_and_layer(name: str | None) -> tuple[str | None, str | None]:
    """Split NAME[@LAYER] into the two names; a part that is absent is None."""
    method, _, layer = (name or "").partition("@")
    return method or None, layer or None
