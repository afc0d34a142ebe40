"""Run a model: explain why images do not fit, restore the model's state, unwrap it, and reuse freed memory."""

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.capture.survey import Survey, survey
from visionattn.errors import DataError, UsageError

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>


def run(model: nn.Module, images_BCHW: Tensor) -> Any:  # a user's model may return a value of any type
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
    if isinstance(error, (UsageError, DataError, torch.OutOfMemoryError)):
        return error
    # in a classifier or detector of this package, a sub-module tells the image size
    teller = next((module for module in model.modules() if _config(module)), model)
    wanted = tuple(_config(teller).get("input_size", ()))
    size = getattr(getattr(teller, "patch_embed", None), "img_size", None) or getattr(teller, "image_size", None)
    given = tuple(images_BCHW.shape[1:])
    if size is not None:
        wanted = (*wanted[:1], *(size if isinstance(size, (tuple, list)) else (size, size)))
        given = given[-len(wanted) :]
    if not wanted or wanted == given:
        return error
    want, got = ("×".join(map(str, shape)) for shape in (wanted, given))
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    remedy = f"resize them, e.g. with preprocess, or make the model with img_size={given[-2:]}"
    if len(wanted) == 3 and wanted[0] != given[0]:
        remedy = f"give them {wanted[0]} channels (as many numbers in mean and std of preprocess)"
    return UsageError(f"this {type(teller).__name__} wants images of {want} and got {got} ({reason}); {remedy}")


def _config(module: nn.Module) -> Mapping[str, Any]:
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    return config if isinstance(config, Mapping) else {}


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the unwrapped model in evaluation mode, with frozen parameters and without gradients or inference mode.

    Gradient checkpointing of timm's models is turned off: checkpointing calls the blocks of a stage one by one, so
    hooks of the stage itself would not run. On exit, the training flags, `requires_grad` and gradient checkpointing are
    restored.

    Raises:
        UsageError: as for `unwrap`.
    """
    bare = unwrap(model)
    training = [module for module in bare.modules() if module.training]
    # parameters that are distributed over processes (DTensor) are not frozen: torch reuses the copies that it gathers,
    # so these copies would stay frozen after the context
    trainable = [part for part in bare.parameters() if part.requires_grad and not hasattr(part, "device_mesh")]
    checkpointing = [module for module in bare.modules() if vars(module).get("grad_checkpointing") is True]
    with torch.inference_mode(False), torch.no_grad():
        try:
            for module in checkpointing:
                vars(module)["grad_checkpointing"] = False
            for module in training:
                module.training = False
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield bare
        finally:
            for module in checkpointing:
                vars(module)["grad_checkpointing"] = True
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


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Raise the trim and mmap thresholds of glibc's malloc for this process; no effect with other C libraries.

    By default, malloc maps every block of 32 MB or more from the system and unmaps the block when it is freed. So the
    kernel clears the pages of the block at every allocation. *Measured*: a ResNet-50 forward pass on two images of
    480 × 640 has 134,000 page faults per image by default and 13,500 with thresholds of 32 MB. The kernel takes 260 ms
    by default and 31 ms with these thresholds. The cost: freed memory stays with the process until the process ends.

    Returns:
        Whether malloc accepted both thresholds.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library: musl, macOS, Windows
        return False
    accepted = [mallopt(_TRIM, 2**31 - 1), mallopt(_MMAP, 32 << 20)]
    mallopt(_MMAP, 1 << 30)  # may fail, since glibc before 2.34 refuses more than 32 MB
    return all(accepted)
