"""Networks of the user's own modules: made by a function, and filled from the files that people have."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.refusals import refuses
from visionattn.errors import DataError, UsageError
from visionattn.models import create_user_model, load_weights

NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))

def make():
    return Net()

def number():
    return 3

def needs_an_argument(size):
    return Net()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with the user's module `own_network_of_a_test`."""
    (tmp_path / "own_network_of_a_test.py").write_text(NETWORK)
    (tmp_path / "broken_network_of_a_test.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("own_network_of_a_test", "broken_network_of_a_test"):
        sys.modules.pop(name, None)


def network():
    return create_user_model("own_network_of_a_test:make")


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "network.", "network.backbone.", "a.b.c."])
@pytest.mark.parametrize("kind", ["torch", "nested", "model key", "legacy", "safetensors"])
def test_weights_load_from_the_files_that_people_have(prefix, kind, folder):
    trained = network()
    nn.init.normal_(trained.head.weight)
    state = {f"{prefix}{name}": value for name, value in trained.state_dict().items()}
    if prefix not in ("", "module.", "_orig_mod.") and kind != "safetensors":
        state["loss.weight"] = torch.ones(3)  # of the task, not of the network
    path = folder / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state, path)
    else:
        content = {"nested": {"state_dict": state, "epoch": 3}, "model key": {"model": state}}.get(kind, state)
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    found = create_user_model("own_network_of_a_test:make", path)
    assert not found.training
    for name, value in trained.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


def test_weights_of_another_network_are_refused(folder):
    torch.save(nn.Linear(2, 2).state_dict(), folder / "w.pth")
    with pytest.raises(
        DataError, match=r"w\.pth do not fit this Net: 4 missing \(conv\.weight, .*; 2 unknown \(weight, bias\)"
    ):
        load_weights(network(), folder / "w.pth")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_module_of_a_test:make", "there is no Python module 'no_module_of_a_test' here"),
        ("own_network_of_a_test:mak", "the module own_network_of_a_test has no function 'mak'"),
        ("own_network_of_a_test:number", "must return a torch.nn.Module, got int"),
        ("own_network_of_a_test:needs_an_argument", "fails without arguments: TypeError"),
        ("broken_network_of_a_test:make", "fails while it is imported: ZeroDivisionError"),
    ],
)
def test_a_function_that_makes_no_network_is_refused(path, message, folder):
    refuses(UsageError, message, create_user_model, path)


def test_a_module_of_the_current_folder_shadows_no_installed_one(folder):
    (folder / "timm.py").write_text("raise SystemExit")
    network()
    assert str(folder) not in sys.path
