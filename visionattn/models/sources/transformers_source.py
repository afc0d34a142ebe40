"""Models of transformers: where they lie, their configurations and weights. No code of a model is run."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from visionattn.errors import DataError, UsageError, first_line
from visionattn.models.architectures import known_architecture
from visionattn.models.hub import offline, only_cache_without_network

PREFIX = "hf:"

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_NOT_ARCHITECTURE = re.compile(r"^_|label|auto_map|attn_implementation|architectures|transformers_version|quantization")
"""What a configuration has beside the shape of the network."""


def source_of(name: str) -> str:
    """Return the folder, or the OWNER/NAME on the hub, that a name means.

    Raises:
        UsageError: the name is neither a folder nor OWNER/NAME.
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


def import_transformers() -> ModuleType:
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


def loading_options(source: str) -> dict[str, Any]:
    """Return arguments for transformers: nothing is downloaded for a folder, and no code of a model is run."""
    # without this argument, transformers asks on the terminal whether to run a model's code
    return {"local_files_only": os.path.isdir(source), "trust_remote_code": False}


@contextlib.contextmanager
def quiet(transformers: ModuleType, source: str = "") -> Iterator[None]:
    """Silence the messages and progress bars of transformers; errors are raised all the same.

    Args:
        transformers: the package.
        source: what is loaded, see `source_of`. A name on the hub comes from the cache if there is no network. For a
            folder, and without a source, no connection is opened, whatever the files ask for.
    """
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with only_cache_without_network() if source and not os.path.isdir(source) else offline():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def read_config(transformers: ModuleType, name: str, options: Mapping[str, Any]) -> Any:
    """Return the configuration of a model: that of its name, or the one in the checkpoint that is being read.

    Args:
        transformers: the library.
        name: `hf:OWNER/NAME` or `hf:FOLDER`.
        options: changes of the configuration.

    Raises:
        UsageError: there is no such model or folder.
        DataError: the configuration cannot be read.
    """
    known = known_architecture(name)
    if known is not None:
        fields = {**known, **options}
        kind = str(fields.pop("model_type", ""))
        try:
            with quiet(transformers):
                return transformers.AutoConfig.for_model(kind, **fields)
        except Exception as error:  # transformers checks the fields in many places
            raise DataError(
                f"the architecture of {name} in the checkpoint cannot be used: {first_line(error)}"
            ) from error
    source = source_of(name)
    try:
        with quiet(transformers, source):
            return transformers.AutoConfig.from_pretrained(source, **loading_options(source), **options)
    except Exception as error:
        raise _unreadable(name, "configuration", error) from error


def architecture_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration that describe the layers; fields that are None are left out."""
    return {
        key: architecture_of(value) if isinstance(value, Mapping) else value
        for key, value in fields.items()
        if value is not None and not _NOT_ARCHITECTURE.search(str(key))
    }


def load_pretrained(
    auto: Any, transformers: ModuleType, name: str, source: str, **options: Any
) -> tuple[Any, list[str]]:
    """Return a model with the weights of its name, and the names of the weights that are missing there."""
    if os.path.isdir(source) and not any(file.endswith((".safetensors", ".bin")) for file in os.listdir(source)):
        raise DataError(f"the folder {source} holds no weights, model.safetensors or pytorch_model.bin")
    try:
        with quiet(transformers, source):
            model, info = auto.from_pretrained(
                source, **loading_options(source), **options, output_loading_info=True, weights_only=True
            )
    except Exception as error:
        raise _unreadable(name, "weights", error) from error
    return model, sorted({*info["missing_keys"], *(key[0] for key in info.get("mismatched_keys", ()))})


def _unreadable(name: str, what: str, error: Exception) -> DataError:
    if "trust_remote_code" in str(error):
        return DataError(f"{name} brings code of its own, which visionattn does not run")
    return DataError(f"the {what} of {name} could not be loaded ({first_line(error)})")
