"""The data of a config, without a trainer."""

import os
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from visionattn.errors import UsageError
from visionattn.training.command import built, find_configs
from visionattn.training.config_errors import explain
from visionattn.training.third_party_warnings import quieten


def data_of(config: str) -> L.LightningDataModule:
    """Build what the `data` section of a config describes, as the Lightning verbs do.

    Args:
        config: a YAML file, as a run's `config.yaml`; `configs/…` are found in the package too.

    Raises:
        UsageError: there is no such file, it is no YAML, it has no data section, or the section is wrong.
        DataError: the data that it describes cannot be used.
    """
    quieten()
    _, path = find_configs(["--config", config])
    if not os.path.isfile(path):
        raise UsageError(f"there is no config {config}")
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{config} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content.get("data"):
        raise UsageError(f"{config} has no data section; give the config.yaml of a run, or a folder of images")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=True)
    try:
        options = parser.parse_object({"data": content["data"]})
    except ArgumentError as error:
        raise UsageError(explain(str(error), {"data": dict})) from error
    data: Any = built(lambda: parser.instantiate_classes(options)).data
    return data
