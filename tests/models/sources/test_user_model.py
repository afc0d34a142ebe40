"""Networks of the user's own modules, made by a function."""

import sys

import pytest

from tests.refusals import refuses
from visionattn.errors import UsageError
from visionattn.models import create_user_model

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
    create_user_model("own_network_of_a_test:make")
    assert str(folder) not in sys.path
