"""Build the data module of a config, without a trainer."""

import os

import lightning as L
from jsonargparse import ArgumentError, ArgumentParser

from visionattn.errors import UsageError
from visionattn.training.command import built, find_configs, read_yaml
from visionattn.training.config_errors import explain
from visionattn.training.third_party_warnings import silence_third_party_warnings


def data_from_config(config: str) -> L.LightningDataModule:
    """Build the data module from the `data` section of a config, as the verbs fit, validate, test and predict do.

    Args:
        config: path of a YAML file, e.g. the `config.yaml` of a run. If a path `configs/…` does not exist in the
            current folder, the file in the installed package is used.

    Raises:
        UsageError: the file does not exist or is not valid YAML, or its `data` section is missing or wrong.
        DataError: the data cannot be used.
    """
    silence_third_party_warnings()
    _, path = find_configs(["--config", config])
    if not os.path.isfile(path):
        raise UsageError(f"there is no config {config}")
    content = read_yaml(path)
    if not content.get("data"):
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
