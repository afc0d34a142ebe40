"""Run a model for a method, and say what is wrong where it does not run."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.capture.survey import Survey, survey
from visionattn.errors import UsageError


def run(model: nn.Module, images_BCHW: Tensor) -> Any:
    """Call the model; where it cannot take images of this size, say which it wants.

    Raises:
        UsageError: the model was made for another image size, or for another number of channels.
    """
    try:
        return model(images_BCHW)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        raise _explained(model, images_BCHW, error) from error


def look(model: nn.Module, images_BCHW: Tensor) -> Survey:
    """Survey a model for these images; see `sites.survey`.

    Raises:
        UsageError: as `run`.
    """
    try:
        return survey(model, (images_BCHW,), {})
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        raise _explained(model, images_BCHW, error) from error


def _explained(model: nn.Module, images_BCHW: Tensor, error: Exception) -> Exception:
    if isinstance(error, UsageError):
        return error
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    wanted = tuple(config.get("input_size", ())) if isinstance(config, dict) else ()
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "image_size", None)
    given = tuple(images_BCHW.shape[1:])
    if size is not None:
        wanted = (*wanted[:1], *(size if isinstance(size, (tuple, list)) else (size, size)))
        given = given[-len(wanted) :]
    if not wanted or wanted == given:
        return error
    want, got = ("×".join(map(str, shape)) for shape in (wanted, given))
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return UsageError(
        f"this {type(model).__name__} wants images of {want} and got {got} ({reason}); resize them, "
        f"or make the model with img_size={given[-2:]}"
    )


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the bare model in evaluation mode, frozen, without gradients or inference mode; then put all back."""
    bare = unwrap(model)
    training = [module for module in bare.modules() if module.training]
    # what is spread over processes is left alone: torch makes whole weights of it once, which would stay frozen
    trainable = [one for one in bare.parameters() if one.requires_grad and not hasattr(one, "device_mesh")]
    with torch.inference_mode(False), torch.no_grad():
        try:
            for module in training:
                module.training = False
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield bare
        finally:
            for module in training:
                module.training = True
            for parameter in trainable:
                parameter.requires_grad_(True)


def unwrap(model: nn.Module) -> nn.Module:
    """Take off what `torch.compile` and data parallelism put around a model.

    Raises:
        UsageError: this is no module, or it is scripted or traced, so that nothing inside can be watched.
    """
    while True:
        if isinstance(model, (torch.jit.ScriptModule, torch.jit.TopLevelTracedModule)):
            raise UsageError("a scripted or traced model cannot be watched; pass the model it was made from")
        if not isinstance(model, nn.Module):
            raise UsageError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model
