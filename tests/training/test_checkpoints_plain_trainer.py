"""Checkpoints that a plain `L.Trainer` writes are read by `load` and by the verbs, or they say why not."""

import functools
import sys

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import visionattn as va
from tests.commands.command_line import fails
from tests.models.transformers_folders import vit
from tests.refusals import refuses
from visionattn.attention import CBAM, ECA
from visionattn.cli import main
from visionattn.data import Preprocess
from visionattn.errors import DataError
from visionattn.models import Classifier, ConvNet
from visionattn.tasks import Classification

PREPROCESS = Preprocess(32, fit="stretch", mean=(0.5,) * 3, std=(0.25,) * 3)
NETWORK = """
from torch import nn

class PlainNet(nn.Module):
    num_classes = 2

    def __init__(self, width=4):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))

def make():
    return PlainNet()
"""


def train(task, folder):
    """Train a task for one step by a plain trainer and loader, and return the path of its checkpoint."""
    task.class_names, task.preprocess = ("cat", "dog"), PREPROCESS
    data = [{"image": torch.randn(3, 32, 32), "label": index % 2} for index in range(8)]
    trainer = L.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu",
    )  # fmt: skip
    loader = DataLoader(data, batch_size=4)
    trainer.fit(task, loader, loader)
    trainer.save_checkpoint(folder / "plain.ckpt")
    return folder / "plain.ckpt"


class Mine(Classification):
    """A task with arguments of its own."""

    def __init__(self, width, *, smooth=0.0):
        super().__init__(ConvNet(2, widths=(width, width), attention=CBAM), label_smoothing=smooth)


NETWORKS = {
    "convnet": lambda: ConvNet(2, widths=(8, 16), attention=functools.partial(ECA)),
    "classifier": lambda: Classifier("test_resnet", num_classes=2, attention=CBAM, options={"drop_rate": 0.1}),
    "torchvision": lambda: Classifier("torchvision:squeezenet1_1", num_classes=2),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_task_is_loaded_with_its_network_names_and_preprocessing(network, tmp_path):
    task = Classification(
        NETWORKS[network](), label_smoothing=0.1, optimizer=functools.partial(torch.optim.SGD, lr=0.1)
    )
    found = va.load(train(task, tmp_path))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(found(x), task.eval()(x))
    assert (found.class_names, found.preprocess, found.label_smoothing) == (("cat", "dog"), PREPROCESS, 0.1)


def test_a_named_backbone_and_a_task_of_ones_own_are_loaded_too(tmp_path):
    vit(tmp_path / "vit")
    task = Classification(Classifier(f"hf:{tmp_path / 'vit'}", num_classes=2, pretrained=True))
    path = train(task, tmp_path)
    (tmp_path / "vit").rename(tmp_path / "moved")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(va.load(path)(x), task.eval()(x))
    task = Mine(6, smooth=0.2)
    path = train(task, tmp_path)
    refuses(DataError, "names tests.training", va.load, path)
    found = va.load(path, trust=["tests"])
    torch.testing.assert_close(found(x), task.eval()(x))
    assert found.label_smoothing == 0.2


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    (tmp_path / "plain_network_of_a_test.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("plain_network_of_a_test", None)


def test_a_network_whose_arguments_are_unknown_is_given_by_the_command(in_folder, photo_folder, capsys):
    from plain_network_of_a_test import PlainNet

    path = train(Classification(PlainNet()), in_folder)
    message = (
        "plain.ckpt was trained by a plain L.Trainer and cannot say what its network is: the arguments of the "
        "plain_network_of_a_test.PlainNet are not known; give the network as --model NAME or MODULE:FUNCTION with "
        "--weights plain.ckpt"
    )
    command = ["overlay", "--images", str(photo_folder / "class0"), "--out", "out"]
    fails([*command, "--ckpt", path.name], 1, message, capsys=capsys)
    capsys.readouterr()
    assert (
        main([*command, "--model", "plain_network_of_a_test:make", "--weights", path.name, "--method", "gradcam"]) == 0
    )
    assert "preprocessing of" not in capsys.readouterr().err  # the checkpoint says it
    assert '"class": "' in (in_folder / "out" / "manifest.jsonl").read_text()


def test_a_checkpoint_of_another_task_names_the_way(tmp_path, capsys):
    torch.save(
        {"pytorch-lightning_version": "2.6", "state_dict": nn.Linear(2, 2).state_dict()}, tmp_path / "other.ckpt"
    )
    refuses(
        DataError,
        "give its network as --model NAME or MODULE:FUNCTION with --weights",
        va.load,
        tmp_path / "other.ckpt",
    )


def test_a_checkpoint_without_preprocessing_takes_it_from_the_command(tmp_path, photo_folder, capsys):
    task = Classification(ConvNet(2))
    train(task, tmp_path)
    content = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    content["visionattn"]["preprocess"] = None
    torch.save(content, tmp_path / "plain.ckpt")
    command = ["overlay", "--images", str(photo_folder / "class0"), "--out", str(tmp_path / "out")]
    command += ["--ckpt", str(tmp_path / "plain.ckpt")]
    fails(command, 1, "has no preprocessing; give --size, --mean and --std", capsys=capsys)
    fails([*command, "--size", "32", "--classes", "a, b"], 2, "--classes needs --model", capsys=capsys)
    assert main([*command, "--size", "32"]) == 0
