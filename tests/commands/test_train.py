"""`visionattn fit`: every config runs, and errors name the wrong option."""

import re
from pathlib import Path

import pytest
import torchvision
import yaml

from tests.commands.command_line import QUICKSTART, FakeMNIST, fails
from tests.conftest import CONFIGS, SMALL
from tests.data.annotated import coco_of_sixteen, voc
from tests.data.tables.labelled import label_table
from visionattn.cli import main


@pytest.mark.parametrize("config", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_runs(config, photo_folder, tmp_path, tmp_path_factory, monkeypatch):
    """Run the command of the config's header, with flags for a short training on test data."""
    monkeypatch.chdir(tmp_path)
    names = re.findall(r"--config configs/(\S+)", re.search(r"^# +visionattn fit .*", config.read_text(), re.M)[0])
    assert CONFIGS / names[-1] == config
    text = "".join((CONFIGS / name).read_text() for name in names)
    command = ["fit", *(f"--config={CONFIGS / name}" for name in names)]
    command += ["--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=false"]
    if "ImageFolderData" in text:
        command += [f"--data.root={photo_folder}", "--data.num_workers=0", "--data.batch_size=4"]
        command += ["--model.network.num_classes=5"]
    if "TableData" in text:
        command += [f"--data.table={label_table(photo_folder, tmp_path_factory.mktemp('table'))}"]
        command += [f"--data.root={photo_folder}", "--data.num_workers=0", "--data.batch_size=4"]
        command += ["--test_after_fit=false"]
    if "AnnotatedData" in text:
        root = (coco_of_sixteen if "root: coco" in text else voc)(tmp_path_factory.mktemp("annotated"))
        command += [] if "root: coco" in text else ["--model.network.num_classes=3"]
        command += [f"--data.root={root}", "--data.num_workers=0", "--data.batch_size=2", "--data.preprocess.size=64"]
        command += ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--test_after_fit=false"]
    if "sizes: [" in text:
        command += ["--model.sizes=[64]" if "vit_" not in text else "--model.sizes=null"]
    if "img_size: 640" in text:
        command += ['--model.network.features.options={"img_size": 64}']
    if "pretrained: true" in text:
        inside = "features." if "FeaturePyramid" in text else ""
        command += [f"--model.network.{inside}pretrained=false"]
    if "torchvision.datasets.MNIST" in text:
        monkeypatch.setattr(torchvision.datasets, "MNIST", FakeMNIST)
        command += ["--data.num_workers=0"]
    assert main(command) == 0
    assert not list(tmp_path.iterdir())  # fast_dev_run writes no files


def test_test_after_fit_uses_the_averaged_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    average = "{class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.99}}"
    assert main(["fit", f"--config={QUICKSTART}", *SMALL, f"--trainer.callbacks=[{average}]"]) == 0
    run = Path("runs/quickstart/0")
    assert main(["test", f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'best.ckpt'}"]) == 0
    assert (run / "test.csv").read_text() == (Path("runs/quickstart/1") / "test.csv").read_text()


def test_a_later_config_overrides_an_earlier_one(tmp_path, capsys):
    extra = tmp_path / "extra.yaml"
    extra.write_text("trainer: {max_epochs: 3}\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", QUICKSTART, "--config", str(extra), "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["max_epochs"] == 3
    assert config["data"]["class_path"] == "visionattn.data.ClutteredDigitsData"


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--trainer.max_epoch=3"], ["no option trainer.max_epoch.", "Nearest: trainer.max_epochs"]),
        (["--name=../../escape"], ["--name must be the name of one folder in runs/", "'../../escape'"]),
        (["--trainer.max_epoks=3"], ["trainer.max_epoks", "trainer.max_epochs"]),
        (["--model.network.widhts=[3]"], ["ConvNet has no option 'widhts'", "Nearest: widths"]),
        (["--model.optimizer.lrr=3"], ["AdamW has no option 'lrr'", "Nearest: lr"]),
        (["--model.network=visionattn.models.ConvNat"], ["ConvNat", "Nearest: ConvNet"]),
        (["--data.batch_size=many"], ["data.batch_size must be int, got many"]),
        (["--trainer.max_epochs=three"], ["trainer.max_epochs must be int, got three"]),
        (["--data.batch_size=0"], ["batch_size must be ≥ 1"]),
        (["--model.network.attention.kernel_size=4", "--trainer.fast_dev_run=true"], ["kernel_size must be odd"]),
    ],
)
def test_error_names_the_mistyped_option_and_the_nearest(flags, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fails(["fit", "--config", QUICKSTART, *flags], 2, *parts, capsys=capsys)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_error_names_the_wrong_option_of_a_detector(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = voc(tmp_path / "voc")
    command = ["fit", "--config", str(CONFIGS / "detection" / "bccd_dense.yaml"), f"--data.root={root}"]
    for flag, message in {
        "--data.bad_boxes=refus": "error: data.bad_boxes must be one of 'drop', 'refuse', got refus",
        "--data.box_format=xyz": "error: data.box_format must be one of 'xyxy', 'xywh', 'cxcywh', got xyz",
        "--data.preprocess.fit=crop": "detection needs letterbox or stretch",
        "--data.splits.trian=x.txt": "splits are train, val and test, not 'trian'. Nearest: train.",
        "--model.sizes=[16]": "sizes must be at least 32 pixels each",
    }.items():
        fails([*command, flag], 2, message, capsys=capsys)


def test_error_names_a_number_of_classes_that_differs_from_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--model.network.num_classes=7", "--trainer.fast_dev_run=true"]
    fails(["fit", "--config", QUICKSTART, *flags], 1, "num_classes 7", "10 classes", "num_classes: 10", capsys=capsys)


def test_error_names_the_data_that_cannot_be_used(photo_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--config", str(CONFIGS / "folder.yaml"), "--trainer.fast_dev_run=true", "--data.num_workers=0"]
    fails([*command, "--data.root=nothing"], 1, "--data.root nothing: there is no folder nothing.", capsys=capsys)
    photos = f"--data.root={photo_folder}"
    fails([*command, photos, "--test_after_fit=true"], 1, "no test split", capsys=capsys)
    assert not (tmp_path / "runs").exists()  # the error came before the training
    (tmp_path / "images" / "empty").mkdir(parents=True)
    fails([*command, "--data.root=images"], 1, "--data.root images: the class 'empty' is empty", capsys=capsys)
    for number in range(4):
        folder = tmp_path / "images" / f"c{number}"
        folder.mkdir()
        for index in range(3):
            (folder / f"{index}.jpg").write_bytes(b"no image")
    for index in range(3):
        (tmp_path / "images" / "empty" / f"{index}.jpg").write_bytes(b"no image")
    fails([*command, "--data.root=images"], 1, ".jpg is not an image that can be read", capsys=capsys)


def test_changing_the_optimizer_drops_the_arguments_of_the_first(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", QUICKSTART, "--model.optimizer=torch.optim.SGD", "--print_config"])
    optimizer = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]
    assert optimizer["init_args"]["weight_decay"] in (0, 0.05)  # SGD's default, or the value of the config
    assert "betas" not in optimizer["init_args"]
