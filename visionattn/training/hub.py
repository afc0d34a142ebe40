"""Models on the Hugging Face hub: weights as safetensors, what they are as JSON, a card with results and an overlay.

Nothing that is loaded from there is unpickled, and only classes of trusted packages are built, as of any checkpoint.
"""

import re
from typing import TYPE_CHECKING

from visionattn.errors import DataError, UsageError

if TYPE_CHECKING:
    pass

PREFIX = "hf://"
"""What a name on the hub begins with: `hf://owner/name`, or `hf://owner/name@revision`."""

WEIGHTS = "model.safetensors"

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def fetch(name: str) -> str:
    """Bring the weights of a model on the hub onto this machine, or find them there; returns the file.

    Args:
        name: `hf://owner/name` or `hf://owner/name@revision`.

    Raises:
        UsageError: this is no such name.
        DataError: the hub does not give the file.
    """
    repo, _, revision = name.removeprefix(PREFIX).partition("@")
    _check_name(repo)
    from huggingface_hub import hf_hub_download

    try:
        return str(hf_hub_download(repo_id=repo, filename=WEIGHTS, revision=revision or None))
    except Exception as error:
        raise DataError(f"{name} could not be had from the hub: {_first_line(error)}") from error


def _check_name(repo: str) -> None:
    if not _NAME.fullmatch(repo):
        raise UsageError(f"a model on the hub is named owner/name, got {repo!r}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
