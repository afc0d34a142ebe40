"""Build the data module of a config, without a trainer."""

import os

import lightning as L
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from visionattn.errors import UsageError
from visionattn.training.command import built, find_configs
from visionattn.training.config_errors import explain
from visionattn.training.third_party_warnings import silence_third_party_warnings


def data_of(config: str) -> L.LightningDataModule:
    """Build the data module from the `data` section of a config, as the verbs fit, validate, test and predict do.

    Args:
        config: path of a YAML file, e.g. the `config.yaml` of a run. If the current folder lacks a file `configs/…`,
            the file in the installed package is used.

    Raises:
        UsageError: the file does not exist, is not valid YAML, or has no `data` section or a wrong one.
        DataError: the data cannot be used.
    """
    silence_third_party_warnings()
    _, path = find_configs(["--config", config])
    if not os.path.isfile(path):
        raise UsageError(f"there is no config {config}")
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{config} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content.get("data"):
        raise UsageError(f"{config} has no data section; give the config.yaml of a run, or a folder of images")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=True)
    try:
        options = parser.parse_object({"data": content["data"]})
    except ArgumentError as error:
        raise UsageError(explain(str(error), {"data": dict})) from error
    data = built(lambda: parser.instantiate_classes(options)).data
    assert isinstance(data, L.LightningDataModule)
    return data
