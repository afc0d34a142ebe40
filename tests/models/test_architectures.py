"""Networks that are named by a place are built from a checkpoint without asking that place."""

import timm
import torch
from torch import nn

from tests.models.transformers_folders import vit
from tests.refusals import refuses
from visionattn.errors import DataError
from visionattn.models import Classifier, architectures_in, only_known_architectures


def test_a_network_is_built_again_without_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vit("there", hidden_size=12)
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=4, depth=3), tmp_path / "timm")
    for name in ("hf:there", "local-dir:timm"):
        network = Classifier(name, num_classes=5).eval()
        known = architectures_in(nn.Sequential(network))
        (tmp_path / name.partition(":")[2]).rename(tmp_path / f"moved {len(name)}")
        with only_known_architectures(known):
            again = Classifier(name, num_classes=5).eval()
        again.load_state_dict(network.state_dict())
        side = 32 if name == "hf:there" else 160
        x = torch.randn(1, 3, side, side)
        torch.testing.assert_close(again(x), network(x))


def test_a_checkpoint_cannot_ask_the_hub():
    for name in ("hf:owner/name", "hf-hub:owner/name"):
        with only_known_architectures({}):
            refuses(DataError, "names the model .* without its architecture", Classifier, name, num_classes=2)
