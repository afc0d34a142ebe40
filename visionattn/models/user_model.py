"""Networks that are not of timm: a function of the user's own module makes one, and a file of weights fills it."""

import contextlib
import importlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from visionattn.errors import DataError, UsageError
from visionattn.models.backbone import read_state, weights_mismatch


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


def create_user_model(path: str, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """Call a function of the user's module that returns a network, and load its weights.

    Args:
        path: MODULE:FUNCTION, e.g. `mynet:make`; the function is called without arguments. A class works too.
        weights: state dict as .safetensors or a file of torch (default: the weights that the function returns).

    Returns:
        The network in evaluation mode.

    Raises:
        UsageError: there is no such module or function, or the function does not return a network.
        DataError: the weights cannot be read, or do not fit.
    """
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
        load_weights(model, weights)
    return model.eval()


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a file of weights into a model, in place.

    The weights may lie under `state_dict` or `model`, and their names may share a prefix, such as `module.` or
    `network.`, which is removed.

    Args:
        model: the model.
        path: state dict as .safetensors or a file of torch; no code in it is executed.

    Raises:
        DataError: the file cannot be read, or the weights do not fit; the message has three names of each kind.
    """
    state = without_prefix(read_state(path), model)
    if reason := weights_mismatch(model, state):
        raise DataError(f"the weights in {os.fspath(path)} do not fit this {type(model).__name__}: {reason}")
    model.load_state_dict(state)


def without_prefix(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the entries of a state dict under the prefix that most of the model's names have there, without it.

    For example, a checkpoint of a task holds the network under `network.`, and its other entries are dropped.
    """
    endings = {name.rpartition(".")[2] for name in model.state_dict()}
    own = model.state_dict().keys()
    prefixes = Counter[str]()
    for name in state:
        parts = name.split(".")
        if parts[-1] in endings:
            suffixes = ((place, ".".join(parts[place:])) for place in range(len(parts)))
            prefixes.update("".join(f"{part}." for part in parts[:place]) for place, end in suffixes if end in own)
    if not prefixes:
        return dict(state)
    prefix = max(prefixes, key=lambda known: (prefixes[known], -len(known)))
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@contextlib.contextmanager
def _current_folder_last() -> Iterator[None]:
    """Search modules in the current folder too, after all installed ones, so that none of them is shadowed."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
