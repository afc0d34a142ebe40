"""Run a model for a method, with errors that explain why the model cannot run."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.capture.survey import Survey, survey
from visionattn.errors import UsageError


def run(model: nn.Module, images_BCHW: Tensor) -> Any:  # whatever the user's model returns
    """Call the model, and return its output.

    Raises:
        UsageError: the model was made for another image size or another number of channels; the message names them.
    """
    try:
        return model(images_BCHW)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        raise _explained(model, images_BCHW, error) from error


def survey_images(model: nn.Module, images_BCHW: Tensor) -> Survey:
    """Survey a model for these images; see `survey.survey`.

    Raises:
        UsageError: as for `run`.
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
    """Yield the unwrapped model in evaluation mode, with frozen parameters, and turn off gradients and inference mode.

    On exit the training flags and `requires_grad` are restored.

    Raises:
        UsageError: as for `unwrap`.
    """
    bare = unwrap(model)
    training = [module for module in bare.modules() if module.training]
    # parameters that are distributed over processes (DTensor) are not frozen: torch gathers them only once, so the
    # gathered copies would stay frozen
    trainable = [part for part in bare.parameters() if part.requires_grad and not hasattr(part, "device_mesh")]
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
    """Return the model inside the wrappers of `torch.compile` and data parallelism.

    Raises:
        UsageError: the argument is not a module; or it is scripted or traced, so that its calls cannot be watched.
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
