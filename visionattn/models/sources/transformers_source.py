"""Where a model of transformers lies, and how its library is called: quietly, and without running a model's code."""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

from visionattn.errors import DataError, UsageError
from visionattn.models.weights import first_line

PREFIX = "hf:"

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def source_of(name: str) -> str:
    """Return the folder, or the OWNER/NAME on the hub, that a name means.

    Raises:
        UsageError: the name is none of both.
        DataError: the folder has no `config.json`.
    """
    source = name.removeprefix(PREFIX)
    if os.path.isdir(source):
        if not os.path.isfile(os.path.join(source, "config.json")):
            raise DataError(f"the folder {source} has no config.json, so it holds no model of transformers")
        return source
    if not _NAME.fullmatch(source) or source.startswith("."):
        raise UsageError(f"{name} is neither a folder nor a model on the hub, which is named hf:OWNER/NAME")
    return source


def import_transformers() -> Any:
    """Import transformers.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"a model hf:… needs the package transformers ({first_line(error)}); install visionattn[transformers]"
        ) from error
    return transformers


def places(source: str) -> dict[str, Any]:
    """Return arguments for transformers: nothing is downloaded for a folder, and no code of a model is run."""
    # without this argument, transformers asks on the terminal whether to run a model's code
    return {"local_files_only": os.path.isdir(source), "trust_remote_code": False}


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Silence the messages and progress bars of transformers; errors are raised all the same."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
