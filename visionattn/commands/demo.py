"""The photographs and the network of `visionattn overlay --demo`."""

import os
from typing import TYPE_CHECKING

from visionattn.errors import DataError, UsageError
from visionattn.files import printable, write_file

if TYPE_CHECKING:
    from visionattn.commands.options import LoadedModel

FOLDER = "visionattn-demo"
"""Where `overlay --demo` writes unless `--out` is given."""


def demo_model() -> "LoadedModel":
    """Load EfficientNet-Lite0, its preprocessing and ImageNet's class names.

    Raises:
        UsageError: the package with its weights is not installed.
    """
    from visionattn.models import class_names_of, efficientnet_lite0, preprocess_of

    model = efficientnet_lite0()
    return model, preprocess_of(model), class_names_of(model)


def write_photographs(folder: str) -> list[str]:
    """Copy the sample photographs and the list of their sources into a folder, unless they are there already.

    Args:
        folder: the folder; it is made if it does not exist.

    Returns:
        The paths of the photographs in the folder.

    Raises:
        UsageError: the folder has another file of the same name.
        DataError: the folder or a file cannot be written.
    """
    from visionattn.data import sample_photographs

    sources = sample_photographs()
    with open(os.path.join(os.path.dirname(sources[0]), "SOURCES.md"), "rb") as file:
        contents = {"SOURCES.md": file.read()}
    for source in sources:
        with open(source, "rb") as file:
            contents[os.path.basename(source)] = file.read()
    paths = {os.path.join(folder, name): content for name, content in contents.items()}
    for path, content in paths.items():
        if os.path.lexists(path) and not _holds(path, content):
            raise UsageError(f"{printable(path)} is not a file of the demo; choose another folder by --out")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {printable(folder)} cannot be made: {error.strerror or error}") from error
    for path, content in paths.items():
        if not os.path.lexists(path):
            write_file(path, content)
    return [os.path.join(folder, os.path.basename(source)) for source in sources]


def _holds(path: str, content: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read() == content
    except OSError:
        return False
