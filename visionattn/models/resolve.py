"""Any model by one string: the kinds of names, and the network, preprocessing and class names of a name."""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from visionattn.data import Preprocess
from visionattn.errors import UsageError, first_line, nearest
from visionattn.models import backbone
from visionattn.models.sources import (
    torchvision_classifier,
    transformers_classifier,
    transformers_detector,
    transformers_processor,
    transformers_source,
)
from visionattn.models.sources.user_model import create_user_model
from visionattn.models.weights import head_of, outputs_of

Kind: TypeAlias = Literal["timm", "torchvision", "transformers", "own"]

KINDS = (
    "a name of timm, hf-hub:OWNER/NAME or local-dir:FOLDER (timm), torchvision:NAME[/WEIGHTS], "
    "hf:OWNER/NAME or hf:FOLDER (transformers), or MODULE:FUNCTION of your own"
)

_FILES = {
    ".onnx": "a graph without modules, in which neither attention nor gradients can be recorded; "
    "give the network that it was exported from",
    ".pt2": "a graph without modules, in which neither attention nor gradients can be recorded; "
    "give the network that it was exported from",
    ".ckpt": "a checkpoint; give it as --ckpt, or as --weights with the name of its network",
    **dict.fromkeys(
        (".pt", ".pth", ".bin", ".safetensors", ".json"), "a file of weights; give it as --weights with --model NAME"
    ),
}
"""Suffix of a file that is no model's name → what it is."""


class NamedModel(nn.Module):
    """A network with the preprocessing and the class names that belong to it, as `load_model` returns it.

    Functions such as `visionattn.overlay` take it as they take a loaded task.

    Args:
        network: (B, C, H, W), normalised → logits (B, K).
        preprocess: prepares a picture; None if unknown.
        class_names: names of the outputs; empty if unknown.
    """

    def __init__(self, network: nn.Module, preprocess: Preprocess | None, class_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.network = network
        self.preprocess = preprocess
        self.class_names = tuple(class_names)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.network(x_BCHW)


def load_model(
    name: str,
    *,
    pretrained: bool = True,
    weights: str | os.PathLike[str] | None = None,
    new_head: bool = False,
    classes: Sequence[str] = (),
    preprocess: Preprocess | None = None,
) -> NamedModel:
    """Load a model by its name, with its weights, preprocessing and class names.

        >>> import visionattn as va
        >>> model = va.load_model("torchvision:resnet18", pretrained=False)
        >>> model.preprocess.size, len(model.class_names)
        (224, 0)

    Args:
        name: a name of timm (`resnet50`), `hf-hub:OWNER/NAME` or `local-dir:FOLDER` of timm; `torchvision:resnet50`,
            with other weights than the default `torchvision:resnet50/IMAGENET1K_V1`; `hf:OWNER/NAME` or `hf:FOLDER` of
            transformers; or `mynet:make`, a function of your module that returns the network.
        pretrained: load the weights that belong to the name (default: True). If False, and without `weights`, the
            weights are random and the class names are empty; this needs the name of a model, and no MODULE:FUNCTION.
        weights: file of weights to load instead, see `read_state`.
        new_head: load all weights but the head's, which stays random (default: False).
        classes: names of the outputs (default: those that belong to the name). For a CLIP or SigLIP, the texts to
            choose from, e.g. `["a cat", "a dog"]`.
        preprocess: prepares a picture (default: the name's own).

    Returns:
        The model in evaluation mode. Its attribute `network` is the network itself.

    Raises:
        UsageError: there is no such model, or it needs other arguments.
        DataError: its files cannot be used.
    """
    kind = kind_of(name)
    own = pretrained and weights is None
    names: Sequence[str] = ()
    if kind == "own":
        if not pretrained and weights is None:
            raise UsageError(
                f"{name} returns weights of its own; random weights (--weights random, or pretrained=False in Python) "
                "need the name of a model"
            )
        network = create_user_model(name, weights, new_head=new_head)
        if own and hasattr(network, "pretrained_cfg"):  # of timm, such as visionattn.models:efficientnet_lite0
            names = backbone.class_names_of(network)
    elif kind == "transformers" and transformers_classifier.is_zero_shot(name) and not (weights or new_head):
        if not classes:
            raise UsageError(
                f'{name} compares images with texts; name them: --classes "a cat, a dog" (classes in Python)'
            )
        network = transformers_classifier.create_zero_shot_classifier(name, classes, pretrained=pretrained)
    else:
        network = _CREATE[kind](name, pretrained=pretrained, weights=weights, new_head=new_head)
        names = _names_of(name, kind, network) if own or (weights and not new_head) else ()
    if preprocess is None:
        preprocess = _preprocess_of(name, kind, network)
    return NamedModel(network, preprocess, classes or names).eval()


def create_network(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    new_head: bool = False,
    **options: Any,
) -> nn.Module:
    """Create the network of a name, with a head of its own number of outputs; see `create_backbone`.

    Args:
        name: as for `load_model`, without MODULE:FUNCTION, since a config names your own network as a class.
        num_classes, pretrained, weights, new_head: see `create_backbone`.
        options: further arguments of the network; they depend on its kind.

    Raises:
        UsageError, DataError: as for `load_model`.
    """
    kind = kind_of(name)
    if kind == "own":
        raise UsageError(
            f"{name} cannot be a backbone; give your own network as a class: network: {{class_path: module.Class}}"
        )
    if kind == "transformers" and transformers_detector.is_transformers_detector(name):
        raise UsageError(f"{name} is a detector, which cannot be a backbone; give the name of a classifier")
    return _CREATE[kind](
        name, num_classes=num_classes, pretrained=pretrained, weights=weights, new_head=new_head, **options
    )


def kind_of(name: str) -> Kind:
    """Return the kind of a model's name: timm, torchvision, transformers or own.

    Raises:
        UsageError: the name is of no kind; the message lists the kinds.
    """
    if name.startswith(torchvision_classifier.PREFIX):
        return "torchvision"
    if name.startswith(transformers_source.PREFIX) and not name.startswith("hf://"):
        return "transformers"
    if name.startswith(backbone.PLACES):
        return "timm"
    if name.startswith("hf://"):
        raise UsageError(f"{name} is a checkpoint of visionattn on the hub; give it as --ckpt, or to visionattn.load")
    suffix = os.path.splitext(name)[1].lower()
    if suffix in _FILES:
        raise UsageError(f"{name} is {_FILES[suffix]}")
    prefix, colon, function = name.partition(":")
    if colon and re.fullmatch(r"\w+(\.\w+)*", prefix) and function.isidentifier():
        near = nearest(f"{prefix}:", ("torchvision:", "hf:", "hf-hub:", "local-dir:"))
        if not near or _is_module(prefix):
            return "own"
        raise UsageError(f"{name!r} is not a model name.{near} Give {KINDS}.")
    if colon or "/" in name:
        remedy = f" For a model of transformers, write hf:{name}." if not colon else ""
        raise UsageError(f"{name!r} is not a model name.{remedy} Give {KINDS}.")
    return "timm"


def _is_module(name: str) -> bool:
    """Return whether a module of the user or an installed one has this name; nothing is imported."""
    path = name.replace(".", os.sep)
    if os.path.isfile(f"{path}.py") or os.path.isdir(path):
        return True
    import importlib.util

    return importlib.util.find_spec(name.partition(".")[0]) is not None


def _create_of_transformers(name: str, **options: Any) -> nn.Module:
    if transformers_detector.is_transformers_detector(name):
        return transformers_detector.create_transformers_detector(name, **options)
    return transformers_classifier.create_transformers_classifier(name, **options)


_CREATE: dict[Kind, Callable[..., nn.Module]] = {
    "timm": backbone.create_backbone,
    "torchvision": torchvision_classifier.create_torchvision_classifier,
    "transformers": _create_of_transformers,
}


def _names_of(name: str, kind: Kind, network: nn.Module) -> tuple[str, ...]:
    """Return the class names that belong to a name, if the network has as many outputs."""
    if kind == "timm":
        return backbone.class_names_of(network)
    if kind == "torchvision":
        names = torchvision_classifier.torchvision_class_names(name)
        return names if len(names) == outputs_of(network, head_of(network)) else ()
    names = transformers_classifier.transformers_class_names(name)
    return names if len(names) == network.num_classes else ()


def _preprocess_of(name: str, kind: Kind, network: nn.Module) -> Preprocess | None:
    if kind == "timm":
        return backbone.preprocess_of(network)
    if kind == "torchvision":
        return torchvision_classifier.torchvision_preprocess(name)
    return transformers_processor.transformers_preprocess(name) if kind == "transformers" else None


def check_size(network: nn.Module, preprocess: Preprocess, name: str) -> None:
    """Run a network once on a grey image of the preprocessing's size.

    Raises:
        UsageError: the network refuses the size; the message names both.
    """
    image = torch.zeros(1, preprocess.channels, *preprocess.input_size)
    like = next(network.parameters(), image)
    try:
        with torch.no_grad():
            network(image.to(like.device, like.dtype))
    except Exception as error:  # networks raise errors of many types
        size = " × ".join(map(str, preprocess.input_size))
        reason = first_line(error)
        raise UsageError(f"{name} does not accept images of {size} pixels ({reason}); give another --size") from error
