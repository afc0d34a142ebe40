"""Test loading from the hub. The fixture `shelf` replaces the hub's client by one that uses local folders."""

import json
import shutil

import huggingface_hub
import torch

import visionattn as va
from tests.refusals import refuses
from visionattn.errors import DataError
from visionattn.training import publishing
from visionattn.training.checkpoints import read


def test_requested_revision_is_downloaded(quick_run, shelf):
    publishing.push(quick_run / "best.ckpt", "me/digits")
    refuses(DataError, "hf://me/digits@v2 could not be downloaded from the hub: 404", va.load, "hf://me/digits@v2")
    assert huggingface_hub.hf_hub_download.call_args.kwargs["revision"] == "v2"
    (shelf / "me" / "digits" / "v2").mkdir()
    shutil.copy(shelf / "me" / "digits" / "model.safetensors", shelf / "me" / "digits" / "v2")
    assert va.load("hf://me/digits@v2").class_names == va.load(quick_run / "best.ckpt").class_names


def test_code_in_a_model_of_the_hub_is_not_run(quick_run, shelf):
    """The attacks are a function of another package as the network, and a pickle in place of the weights."""
    from safetensors.torch import load_file, save_file

    publishing.push(quick_run / "best.ckpt", "me/digits")
    weights = shelf / "me" / "digits" / "model.safetensors"
    entry = read(weights)["visionattn"]
    entry["model"]["init_args"]["network"] = {"class_path": "os.system", "init_args": {"command": "touch harm"}}
    save_file(load_file(weights), weights, metadata={"visionattn": json.dumps(entry)})
    refuses(DataError, r"names os\.system, which is not a module of", va.load, "hf://me/digits")
    torch.save({"state_dict": {}, "visionattn": {}}, weights)
    refuses(DataError, "cannot be read as a checkpoint", va.load, "hf://me/digits")
