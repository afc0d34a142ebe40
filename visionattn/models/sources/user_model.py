"""Networks of the user: a function of their module returns one, and a file of weights can be loaded into it."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator

from torch import nn

from visionattn.errors import UsageError
from visionattn.models.weights import load_weights, require_weights


def import_package(name: str) -> None:
    """Import a package of the user, from the current folder if it is not installed.

    Raises:
        UsageError: there is no such package, or it fails while it is imported.
    """
    try:
        with _current_folder_last():
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(f"there is no Python module {error.name!r} here or among the installed packages") from error
    except Exception as error:
        raise UsageError(f"the module {name} fails while it is imported: {type(error).__name__}: {error}") from error


def create_user_model(path: str, weights: str | os.PathLike[str] | None = None, *, new_head: bool = False) -> nn.Module:
    """Call a function of the user's module that returns a network, and load its weights.

    Args:
        path: MODULE:FUNCTION, e.g. `mynet:make`; the function is called without arguments. A class works too.
        weights: file of weights, see `load_weights` (default: the weights that the function returns).
        new_head: keep the head that the function returns, and load all other weights (default: False).

    Returns:
        The network in evaluation mode.

    Raises:
        UsageError: there is no such module or function, or the function does not return a network.
        DataError: the weights cannot be read, or do not fit.
    """
    if new_head:
        require_weights(weights)
    module, _, name = path.partition(":")
    import_package(module)
    make = getattr(sys.modules[module], name, None)
    if not callable(make):
        raise UsageError(f"the module {module} has no function {name!r}")
    try:
        model = make()
    except Exception as error:
        raise UsageError(f"{path} fails without arguments: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{path} must return a torch.nn.Module, got {type(model).__name__}")
    if weights is not None:
        load_weights(model, weights, new_head=new_head, name=path)
    return model.eval()


@contextlib.contextmanager
def _current_folder_last() -> Iterator[None]:
    """Search modules in the current folder too, after all installed ones, so that none of them is shadowed."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
