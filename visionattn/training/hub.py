"""Download models from the Hugging Face hub.

The weights are .safetensors files, which cannot contain code. `checkpoints.load` reads them as any other checkpoint.
"""

import re

from visionattn.errors import DataError, UsageError, first_line

PREFIX = "hf://"
"""Prefix of a model's name on the hub: `hf://owner/name`, or `hf://owner/name@revision`."""

WEIGHTS = "model.safetensors"

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def fetch(name: str) -> str:
    """Download the weights of a model from the hub, unless they are in the local cache.

    Args:
        name: `hf://owner/name` or `hf://owner/name@revision`.

    Returns:
        The path of the .safetensors file.

    Raises:
        UsageError: the name is malformed.
        DataError: the download fails.
    """
    repo, _, revision = name.removeprefix(PREFIX).partition("@")
    _check_name(repo)
    from huggingface_hub import hf_hub_download

    try:
        return str(hf_hub_download(repo_id=repo, filename=WEIGHTS, revision=revision or None))
    except Exception as error:
        raise DataError(f"{name} could not be downloaded from the hub: {first_line(error)}") from error


def _check_name(repo: str) -> None:
    if not _NAME.fullmatch(repo):
        raise UsageError(f"a model on the hub is named owner/name, got {repo!r}")
