"""`visionattn push` uploads a model that `va.load` can load again."""

import json

import huggingface_hub
import numpy as np
import torch

import visionattn as va
from visionattn.cli import main
from visionattn.data import read_image
from visionattn.training.checkpoints import read


def test_a_pushed_model_loads_with_the_same_weights(quick_run, shelf, capsys):
    assert main(["push", "--ckpt", str(quick_run / "best.ckpt"), "--repo", "me/digits"]) == 0
    assert capsys.readouterr().out.strip() == "https://huggingface.co/me/digits"
    assert huggingface_hub.HfApi.return_value.create_repo.call_args.kwargs["private"] is True
    folder = shelf / "me" / "digits"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md", "overlay.png"}
    before, after = va.load(quick_run / "best.ckpt"), va.load("hf://me/digits")
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, rtol=0, atol=0)
    assert (after.preprocess, after.class_names) == (before.preprocess, before.class_names)
    assert json.loads((folder / "config.json").read_text()) == json.loads(
        json.dumps(read(quick_run / "best.ckpt")["visionattn"])
    )
    np.testing.assert_array_equal(read_image(folder / "overlay.png"), read_image(quick_run / "overlays" / "test.png"))
