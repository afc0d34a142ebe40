"""Weights are read from every common file format; errors name the weights that do not fit the model."""

import json
import pickle
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from tests.refusals import refuses
from visionattn.errors import DataError
from visionattn.models import create_backbone, load_weights
from visionattn.models.weights import head_of, read_state, replace_heads, without_wrappers

PREFIXES = [
    *("", "module.", "model.", "_orig_mod.", "backbone.", "network.", "network.backbone.", "a.b.c."),
    *("module._orig_mod.", "_orig_mod.module.", "model.module.backbone."),
]
KEYS = ["state_dict", "model", "model_ema", "ema", "teacher", "model_state_dict"]


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(other[name], value)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors", *KEYS])
def test_weights_load_from_the_files_that_people_have(prefix, kind, tmp_path):
    trained, found = Net(), Net()
    state = {f"{prefix}{name}": value for name, value in trained.state_dict().items()}
    if prefix in ("model.", "network.", "a.b.c."):
        state["loss.weight"] = torch.ones(3)  # of the task, not of the network
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state, path)
    else:
        content = {kind: state, "epoch": 3, "args": {"lr": 0.1}} if kind in KEYS else state
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    load_weights(found, path)
    same(trained.state_dict(), found.state_dict())


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_timm_model_takes_the_same_files(prefix, tmp_path):
    trained = timm.create_model("test_resnet", num_classes=4)
    state = {f"{prefix}{name}": value for name, value in trained.state_dict().items()}
    torch.save({"model_ema": state}, tmp_path / "w.pth")
    same(trained.state_dict(), create_backbone("test_resnet", weights=tmp_path / "w.pth").state_dict())


def sharded(folder, state, suffix):
    """Write a state dict as two files and their index."""
    names = list(state)
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    parts = {f"{stem}-0000{part + 1}-of-00002.{suffix}": names[part::2] for part in range(2)}
    for part, keys in parts.items():
        write = save_file if suffix == "safetensors" else torch.save
        write({key: state[key] for key in keys}, folder / part)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {k: part for part, ks in parts.items() for k in ks}}))
    return index


def test_settings_under_the_key_of_a_model_do_not_hide_its_weights(tmp_path):
    trained = Net().state_dict()
    nested = {"model": {"arch": "vit", "args": {"depth": 3}}, "ema": {"state_dict": trained}}
    nested["net"] = nested  # a file from a stranger may contain itself
    torch.save(nested, tmp_path / "w.pth")
    same(trained, read_state(tmp_path / "w.pth"))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_in_several_files_load_from_their_index(suffix, tmp_path):
    trained, found = Net(), Net()
    index = sharded(tmp_path, trained.state_dict(), suffix)
    load_weights(found, index)
    same(trained.state_dict(), found.state_dict())
    part = next(tmp_path.glob("*-00001-*"))
    refuses(DataError, rf"is one part of several; give their index, e\.g\. .*{index.name}", read_state, part)
    part.unlink()
    refuses(DataError, "but there is no such file beside it", read_state, index)


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": {"a": "../w.bin"}}', '{"weight_map": {"a": "b.json"}}'])
def test_a_broken_index_is_refused(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    refuses(
        DataError,
        "no index of weights|must lie in the same folder",
        read_state,
        tmp_path / "model.safetensors.index.json",
    )


class RunsCode:
    def __reduce__(self):
        return print, ("code from the weights file runs",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["code", "network"])
def test_a_pickle_runs_no_code(kind, zipped, tmp_path, capsys):
    content = RunsCode() if kind == "code" else nn.Linear(2, 2)
    torch.save({"state_dict": content}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    refuses(
        DataError, r"w\.pth holds no weights that can be read safely: it contains code", read_state, tmp_path / "w.pth"
    )
    (tmp_path / "w.bin").write_bytes(pickle.dumps(content))
    refuses(DataError, "read safely", read_state, tmp_path / "w.bin")
    assert "runs" not in capsys.readouterr().out


def test_what_did_not_fit_is_told_in_one_sentence(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pth")
    refuses(
        DataError,
        r"w\.pth \(--weights\) do not fit this Net: 4 missing \(conv\.weight, .*, …\); 2 unknown \(weight, bias\)$",
        load_weights,
        Net(),
        tmp_path / "w.pth",
    )
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    refuses(
        DataError, "holds no weights: there is no tensor in it or under state_dict", read_state, tmp_path / "empty.pth"
    )


def test_a_new_head_keeps_the_rest(tmp_path, capsys):
    trained, found = Net(classes=5), Net(classes=3)
    torch.save({**trained.state_dict(), "projector.weight": torch.ones(2)}, tmp_path / "w.pth")
    refuses(DataError, "1 unknown .*; 2 of another shape .*new_head: true", load_weights, found, tmp_path / "w.pth")
    head = found.head.weight.clone()
    load_weights(found, tmp_path / "w.pth", new_head=True)
    assert torch.equal(found.conv.weight, trained.conv.weight)
    assert torch.equal(found.head.weight, head)
    assert "the model does not use 1 of the weights (projector.weight) in " in capsys.readouterr().err
    torch.save({"head.weight": torch.zeros(3, 4)}, tmp_path / "head.pth")
    refuses(DataError, "2 missing", load_weights, found, tmp_path / "head.pth", new_head=True)


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.conv = nn.Linear(4, 3), nn.Conv2d(3, 4, 3, padding=1)


def test_the_layer_that_a_new_head_leaves_out_is_named(tmp_path, capsys):
    """The network registers its head first, so the convolution is left out; the user must see this."""
    trained, found = HeadFirst(), HeadFirst()
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    load_weights(found, tmp_path / "w.pth", new_head=True, name="mynet:make")
    message = f"{tmp_path / 'w.pth'}: all weights are loaded but those of conv, the last layer of mynet:make\n"
    assert capsys.readouterr().err == message
    assert torch.equal(found.head.weight, trained.head.weight)
    assert not torch.equal(found.conv.weight, trained.conv.weight)


def test_a_timm_backbone_is_loaded_under_a_new_head(tmp_path):
    trained = timm.create_model("test_vit", num_classes=0)
    torch.save(
        {"teacher": {f"backbone.{name}": value for name, value in trained.state_dict().items()}}, tmp_path / "w.pth"
    )
    image = torch.randn(1, 3, 160, 160)
    with pytest.raises(DataError) as error:
        create_backbone("test_vit", weights=tmp_path / "w.pth")
    assert re.search(r"2 missing \(head.weight, head.bias\); for a new head, add --new-head", str(error.value))
    found = create_backbone("test_vit", weights=tmp_path / "w.pth", new_head=True, num_classes=6).eval()
    torch.testing.assert_close(found.forward_features(image), trained.eval().forward_features(image))
    assert found(image).shape == (1, 6)
    assert create_backbone("test_vit", weights=tmp_path / "w.pth", new_head=True).num_classes == 0


def test_wrappers_are_removed_without_the_model():
    assert without_wrappers({"module.x": torch.ones(1), "module.y": torch.ones(1)}, ["conv1.weight"]).keys() == {
        "x",
        "y",
    }
    kept = without_wrappers({"visual.conv1.weight": torch.ones(1), "text.x": torch.ones(1)}, ["conv1.weight"])
    assert kept.keys() == {"conv1.weight"}


def test_the_head_is_the_last_layer():
    assert head_of(Net()) == "head"
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 7, 1, bias=False), nn.Flatten()))
    assert head_of(net) == "1.0"
    replace_heads(net, [head_of(net)], 2)
    assert net[1][0].weight.shape == (2, 4, 1, 1)
    assert net[1][0].bias is None
