"""Run a model for a method, and say what is wrong where it does not run."""

from typing import Any

from torch import Tensor, nn

from visionattn.errors import UsageError
from visionattn.maps.sites import Survey, survey


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
