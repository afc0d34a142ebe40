"""The command line as a user meets it."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image

from tests.conftest import CONFIGS, SMALL
from tests.data.annotated import GAPS, NAMES, coco, coco_of_sixteen, voc
from tests.overlay.test_video import film
from visionattn.cli import main
from visionattn.data import read_image

QUICKSTART = str(CONFIGS / "quickstart.yaml")


def run_python(code, folder):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def fails(arguments, code, *parts, capsys):
    """Run the command line; it must end with this code, and one sentence that holds all parts."""
    assert main(arguments) == code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    for part in parts:
        assert part in message
    return message


def test_help_is_quick_and_imports_no_torch(tmp_path):
    code = "import sys; from visionattn.cli import main; main(['--help']); print({'torch', 'numpy'} & set(sys.modules))"
    started = time.perf_counter()
    result = run_python(code, tmp_path)
    assert time.perf_counter() - started < 1
    assert result.stdout.splitlines()[-1] == "set()"
    for verb in ("fit", "validate", "test", "predict", "data", "overlay", "score", "export"):
        assert f"  {verb} " in result.stdout


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    heavy = "{'torch', 'numpy', 'cv2', 'lightning', 'timm', 'albumentations'}"
    result = run_python(f"import sys, visionattn, visionattn.data; print({heavy} & set(sys.modules))", tmp_path)
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.parametrize("verb", ["fit", "data", "overlay", "score"])
def test_every_verb_has_its_help(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert "--help" in capsys.readouterr().out


def test_quickstart_leaves_everything_in_its_run(quick_run):
    names = {path.relative_to(quick_run).as_posix() for path in quick_run.rglob("*") if path.is_file()}
    assert {"config.yaml", "best.ckpt", "last.ckpt", "metrics.csv", "test.csv", "confusion.csv"} <= names
    assert {"overlays/test.png", "overlays/epoch_000.jpg"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert [path.name for path in quick_run.parents[2].iterdir()] == ["runs"]  # nothing in the current folder
    with open(quick_run / "test.csv") as file:
        figures = {name: float(value) for name, value in list(csv.reader(file))[1:]}
    assert {"accuracy", "top5", "f1", "calibration_error", "loss"} <= figures.keys()
    assert {"pointing", "pointing_centre_guess", "pointing_chance"} <= figures.keys()
    with open(quick_run / "confusion.csv") as file:
        rows = list(csv.reader(file))[1:]
    assert sum(int(count) for row in rows for count in row[1:]) == 64


@pytest.mark.parametrize("config", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_runs(config, photo_folder, tmp_path, tmp_path_factory, monkeypatch):
    """By the command in its header, with flags that make it short and point it at other data."""
    monkeypatch.chdir(tmp_path)
    names = re.findall(r"--config configs/(\S+)", re.search(r"^# +visionattn fit .*", config.read_text(), re.M)[0])
    assert CONFIGS / names[-1] == config
    text = "".join((CONFIGS / name).read_text() for name in names)
    command = ["fit", *(f"--config={CONFIGS / name}" for name in names)]
    command += ["--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=false"]
    if "ImageFolderData" in text:
        command += [f"--data.root={photo_folder}", "--data.num_workers=0", "--data.batch_size=4"]
        command += ["--model.network.num_classes=5"]
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
    assert not list(tmp_path.iterdir())  # a rehearsal leaves nothing behind


class FakeMNIST(torchvision.datasets.VisionDataset):
    """Noise in the form of MNIST, which cannot be downloaded in a test."""

    classes = [str(number) for number in range(10)]  # noqa: RUF012

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        self.data = np.random.default_rng(0).integers(0, 256, (6000, 28, 28), dtype=np.uint8)
        self.targets = torch.arange(6000) % 10

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return Image.fromarray(self.data[index]), int(self.targets[index])


def test_detection_leaves_its_report_and_predictions(tmp_path, monkeypatch):
    """From training to COCO's json, by the command line, on data in COCO's layout."""
    monkeypatch.chdir(tmp_path)
    root = coco(tmp_path / "coco")
    sizes = ["--data.num_workers=0", "--data.preprocess.size=64", "--data.batch_size=2", "--trainer.accelerator=cpu"]
    config = str(CONFIGS / "detection" / "bccd_dense.yaml")
    command = ["fit", f"--config={config}", f"--data.root={root}", *sizes, "--trainer.max_epochs=1"]
    command += ["--trainer.enable_progress_bar=false", "--trainer.check_val_every_n_epoch=1"]
    command += ["--overlays.every_n_epochs=1", "--test_after_fit=false", "--trainer.log_every_n_steps=1"]
    assert main(command) == 0
    run = Path("runs/bccd-dense/0")
    assert (run / "overlays" / "epoch_000.jpg").exists()
    with open(run / "metrics.csv") as file:
        logged = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    assert {"train/loss", "train/loss_class", "train/loss_box", "val/map", "val/map_50", "val/map/cat"} <= logged
    from visionattn.training import load

    assert load(run / "best.ckpt").class_names == NAMES

    os.environ.pop("VISIONATTN_RUN")
    command = ["predict", f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'best.ckpt'}"]
    assert main(command) == 0
    results = json.loads(Path("runs/bccd-dense/1/predictions.json").read_text())
    assert {result["category_id"] for result in results} <= set(GAPS)
    assert {result["image_id"] for result in results} <= {1, 11}
    for result in results:
        x, y, width, height = result["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + width <= 80.01
        assert y + height <= 60.01
    assert len(list(Path("runs/bccd-dense/1/predictions").iterdir())) == 2
    model, images = ["--ckpt", str(run / "best.ckpt")], ["--images", str(root / "val2017")]
    assert main(["overlay", *model, *images, "--out", "seen", "--method", "odam", "--save", "overlay", "boxes"]) == 0
    assert len(list(Path("seen").rglob("*.boxes.jpg"))) == 2
    assert main(["explore", *model, *images, "--out", "seen.html"]) == 0
    assert main(["score", *model, "--data", str(run / "config.yaml")]) == 2


def test_the_test_after_fit_is_of_the_averaged_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    average = "{class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.99}}"
    assert main(["fit", f"--config={QUICKSTART}", *SMALL, f"--trainer.callbacks=[{average}]"]) == 0
    os.environ.pop("VISIONATTN_RUN")
    run = Path("runs/quickstart/0")
    assert main(["test", f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'best.ckpt'}"]) == 0
    assert (run / "test.csv").read_text() == (Path("runs/quickstart/1") / "test.csv").read_text()


def test_print_config_and_several_configs(tmp_path, capsys):
    extra = tmp_path / "extra.yaml"
    extra.write_text("trainer: {max_epochs: 3}\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", QUICKSTART, "--config", str(extra), "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["max_epochs"] == 3
    assert config["data"]["class_path"] == "visionattn.data.ClutteredDigitsData"


def test_attention_is_inserted_from_yaml_and_comes_back_with_the_checkpoint(tmp_path, monkeypatch, capsys):
    from visionattn.training import load

    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(Path(QUICKSTART).read_text())
    config["model"]["init_args"]["network"] = {
        "class_path": "visionattn.models.Classifier",
        "init_args": {
            "backbone": "test_resnet",
            "num_classes": 10,
            "attention": {"class_path": "visionattn.attention.CBAM", "init_args": {"reduction": 8}},
            "attention_at": ["layer3", "layer4"],
        },
    }
    for part in ("overlays", "report"):
        config[part]["method"]["init_args"]["layer"] = "backbone.layer3"  # the gate that was inserted
    Path("inserted.yaml").write_text(yaml.safe_dump(config))
    flags = [*SMALL, "--model.gamma_lr_factor=50", "--test_after_fit=false"]
    assert main(["fit", "--config", "inserted.yaml", *flags]) == 0
    run = Path("runs/quickstart/0")
    gammas = {name: t.item() for name, t in load(run / "best.ckpt").state_dict().items() if name.endswith(".gamma")}
    saved = torch.load(run / "best.ckpt", weights_only=True)["state_dict"]
    assert gammas == {name: saved[name].item() for name in gammas}
    assert len(gammas) == 2
    assert all(abs(gamma) > 1e-3 for gamma in gammas.values())  # they have opened
    command = ["test", "--config", str(run / "config.yaml"), f"--ckpt_path={run / 'best.ckpt'}"]
    assert main(command) == 0
    fails(
        ["fit", "--config", "inserted.yaml", *flags, "--model.network.attention_at=layer7"],
        2,
        "no module of this ResNet is named 'layer7'",
        "layer4",
        capsys=capsys,
    )


def test_a_network_trained_with_all_tokens_is_tested_with_fewer(tmp_path, monkeypatch, capsys):
    from visionattn.attention import tokens
    from visionattn.training import load

    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(Path(QUICKSTART).read_text())
    small = {"img_size": 64, "patch_size": 16, "depth": 2, "embed_dim": 24, "num_heads": 2}
    config["model"]["init_args"]["network"] = {
        "class_path": "visionattn.models.Classifier",
        "init_args": {"backbone": "vit_tiny_patch16_224", "num_classes": 10, "options": small},
    }
    for part in ("overlays", "report"):
        config[part]["method"] = {"class_path": "visionattn.maps.RawAttention"}
    Path("vit.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "vit.yaml", *SMALL, "--name=dense"]) == 0
    run = Path("runs/dense/0")
    given = ["--config", str(run / "config.yaml"), f"--ckpt_path={run / 'best.ckpt'}"]
    fewer = ["--model.network.tokens=visionattn.attention.TokenMerging", "--model.network.tokens.rate=3"]
    fails(["fit", *given, *fewer], 2, "tokens.init_args.rate is 3 here and not set in it", capsys=capsys)
    merged, plain = [], tokens.likest_pairs
    monkeypatch.setattr(tokens, "likest_pairs", lambda *args: merged.append(args) or plain(*args))
    monkeypatch.delenv("VISIONATTN_RUN")
    assert main(["test", *given, *fewer, "--name=fewer"]) == 0
    assert len(merged) >= 4  # two blocks, two batches
    assert Path("runs/fewer/0/test.csv").exists()
    content = torch.load(run / "best.ckpt", weights_only=True)
    chosen = {"class_path": "visionattn.attention.TokenMerging", "init_args": {"rate": [3, 2]}}
    content["visionattn"]["model"]["init_args"]["network"]["init_args"]["tokens"] = chosen
    torch.save(content, "merged.ckpt")  # as a run with them in its config writes it
    network = load("merged.ckpt").network.backbone
    assert network.forward_features(torch.randn(2, 3, 64, 64)).shape == (2, 1 + 16 - 3 - 2, 24)


def test_a_config_is_found_from_anywhere(tmp_path, monkeypatch):
    from visionattn.training.command import find_configs

    monkeypatch.chdir(tmp_path)
    (found,) = find_configs(["--config=configs/quickstart.yaml"])
    assert Path(found.removeprefix("--config=")).read_text() == Path(QUICKSTART).read_text()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
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
def test_typos_are_named(flags, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fails(["fit", "--config", QUICKSTART, *flags], 2, *parts, capsys=capsys)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_typos_in_a_file_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "typo.yaml"
    config.write_text(Path(QUICKSTART).read_text().replace("num_classes", "num_classe"))
    fails(["fit", "--config", str(config)], 2, "no option 'num_classe'", "Nearest: num_classes", capsys=capsys)
    config.write_text("trainer: {max_epochs: 1\n")
    fails(["fit", "--config", str(config)], 2, "Problems parsing config", capsys=capsys)
    fails(["fit", "--config", "nothing.yaml"], 2, "there is no config", "nothing.yaml", capsys=capsys)
    fails(["fit", "--config", "configs/quikstart.yaml"], 2, "Nearest: configs/quickstart.yaml", capsys=capsys)
    fails(["fti"], 2, "no verb 'fti'", "Nearest: fit", capsys=capsys)


def test_wrong_choices_of_a_detector_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = voc(tmp_path / "voc")
    command = ["fit", "--config", str(CONFIGS / "detection" / "bccd_dense.yaml"), f"--data.root={root}"]
    for flag, told in {
        "--data.bad_boxes=refus": "error: data.bad_boxes must be one of 'drop', 'refuse', got refus",
        "--data.box_format=xyz": "error: data.box_format must be one of 'xyxy', 'xywh', 'cxcywh', got xyz",
        "--data.preprocess.fit=crop": "detection needs letterbox or stretch",
        "--data.splits.trian=x.txt": "splits are train, val and test, not 'trian'. Nearest: train.",
        "--model.sizes=[16]": "sizes must be at least 32 pixels each",
    }.items():
        fails([*command, flag], 2, told, capsys=capsys)


def test_classes_that_differ_from_the_data_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--model.network.num_classes=7", "--trainer.fast_dev_run=true"]
    fails(["fit", "--config", QUICKSTART, *flags], 1, "num_classes 7", "10 classes", "num_classes: 10", capsys=capsys)


def test_data_that_cannot_be_used_is_named(photo_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--config", str(CONFIGS / "folder.yaml"), "--trainer.fast_dev_run=true", "--data.num_workers=0"]
    fails([*command, "--data.root=nothing"], 1, "there is no folder nothing", capsys=capsys)
    photos = f"--data.root={photo_folder}"
    fails([*command, photos, "--test_after_fit=true"], 1, "no test split", capsys=capsys)
    assert not (tmp_path / "runs").exists()  # told before the training
    (tmp_path / "images" / "empty").mkdir(parents=True)
    fails([*command, "--data.root=images"], 1, "the class 'empty' is empty", capsys=capsys)
    for number in range(4):
        folder = tmp_path / "images" / f"c{number}"
        folder.mkdir()
        for index in range(3):
            (folder / f"{index}.jpg").write_bytes(b"no image")
    for index in range(3):
        (tmp_path / "images" / "empty" / f"{index}.jpg").write_bytes(b"no image")
    fails([*command, "--data.root=images"], 1, ".jpg is no image that can be read", capsys=capsys)


def test_weights_are_asked_for_before_scoring(quick_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for verb in ("test", "validate", "predict"):
        fails([verb, "--config", QUICKSTART], 2, "needs trained weights", "--ckpt_path untrained", capsys=capsys)
    assert main(["validate", "--config", QUICKSTART, "--ckpt_path=untrained", *SMALL]) == 0


def test_a_checkpoint_is_tested_and_predicts(quick_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(quick_run / "config.yaml")
    assert main(["test", "--config", config, f"--ckpt_path={quick_run / 'best.ckpt'}"]) == 0
    again = tmp_path / "runs" / "quickstart" / "0" / "test.csv"
    assert again.read_text() == (quick_run / "test.csv").read_text()

    os.environ.pop("VISIONATTN_RUN")
    assert main(["predict", "--config", config, f"--ckpt_path={quick_run / 'best.ckpt'}"]) == 0
    with open(tmp_path / "runs" / "quickstart" / "1" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"digits/test/{index:06d}.png" for index in range(64)]


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--model.optimizer.lr=0.5", "model.init_args.optimizer.init_args.lr is 0.5 here and 0.01 in it"),
        (
            "--model.network.attention=visionattn.attention.ECA",
            "visionattn.attention.ECA' here and 'visionattn.attention.CBAM",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "test"])
def test_a_flag_that_contradicts_the_checkpoint_is_refused_by_name(
    verb, flag, part, quick_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before = (quick_run / "best.ckpt").read_bytes()
    checkpoint = f"--ckpt_path={quick_run / 'best.ckpt'}"
    fails([verb, "--config", str(quick_run / "config.yaml"), checkpoint, flag], 2, part, capsys=capsys)
    assert (quick_run / "best.ckpt").read_bytes() == before


def test_choosing_an_optimizer_leaves_no_argument_of_another_behind(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", QUICKSTART, "--model.optimizer=torch.optim.SGD", "--print_config"])
    optimizer = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]
    assert optimizer["init_args"]["weight_decay"] in (0, 0.05)  # SGD's own, or what the config itself says
    assert "betas" not in optimizer["init_args"]


def test_overlays_of_a_checkpoint(quick_run, tmp_path, capsys):
    from visionattn.data import ClutteredDigits

    data = ClutteredDigits("test", size=3)
    (tmp_path / "in").mkdir()
    for index in range(3):
        picture = data.read_source(data[index]["path"])
        Image.fromarray(picture).save(tmp_path / "in" / f"{index}.png")
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    flags = ["--images", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--ckpt", str(quick_run / "best.ckpt")]
    assert main(["overlay", *flags]) == 1  # one failed
    told = capsys.readouterr().out
    assert "3 overlays" in told
    assert "broken.jpg: is no image that can be read" in told
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    done = [line for line in lines if line["status"] == "done"]
    assert [line["class"] for line in done] == [str(line["prediction"]) for line in done]
    for line in done:
        assert read_image(tmp_path / "out" / line["outputs"]["overlay"]).shape == (64, 64, 3)
    assert main(["overlay", *flags, "--method", "gate", "--layer", "blocks.0"]) == 1
    assert "gate of blocks.0" in capsys.readouterr().out
    fails(["overlay", *flags, "--method", "rollout"], 2, "Methods that fit: gate, gradcam", capsys=capsys)


def readme_commands():
    section = (CONFIGS.parent / "README.md").read_text().split("## Overlays of folders")[1].split("\n## ")[0]
    return re.findall(r"^    visionattn (overlay .*)$", section, re.M)


@pytest.mark.parametrize("command", readme_commands())
def test_the_commands_of_the_readme_do_what_they_say(command, quick_run, photo_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photo_folder / "class0", "holiday")
    for number in range(2, 12):
        Path(f"holiday/{number}.png").unlink()
    Image.open("holiday/0.png").convert("RGB").save("holiday/x.jpg")
    Path("list.csv").write_text("path,target,x0,y0,x1,y1,label\nholiday/0.png,3,5,5,20,20,thing\nholiday/1.png\n")
    film(tmp_path / "film.mp4", range(0, 200, 20))
    for name, weights in (("a", "best"), ("b", "last")):
        Path(f"runs/{name}/0").mkdir(parents=True)
        shutil.copy(quick_run / f"{weights}.ckpt", f"runs/{name}/0/best.ckpt")
    words = shlex.split(command)
    if "--model" in words:
        words[words.index("--model") + 1] = {"resnet50": "test_resnet", "vit_small_patch16_224": "test_vit"}[
            words[words.index("--model") + 1]
        ]
        words += ["--weights", "random"]
    assert main(words) == 0
    out = Path(words[words.index("--out") + 1])
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    expected = 2 if {"list.csv", "film.mp4"} & set(words) else 3
    assert len(lines) == expected
    kinds = words[words.index("--save") + 1 : words.index("--weights")] if "--save" in words else ["overlay"]
    for line in lines:
        assert line["status"] == "done"
        assert list(line["outputs"]) == kinds
        assert all((out / name).is_file() for name in line["outputs"].values())
        methods = {"--method": 3}.get("--method" if "rollout" in words else "", 2 if "--compare" in words else 1)
        assert len(line.get("looks", [1])) == methods
    told = capsys.readouterr().out
    assert f"{expected} overlays" in told
    assert main(words) == 0
    assert f"{expected} as before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--save", "overlai"], ["no kind 'overlai' to save", "Nearest: overlay"]),
        (["--save", "difference"], ["--compare A.ckpt B.ckpt"]),
        (["--save", "mask", "--method", "raw", "rollout"], ["mask holds one heatmap an image and not 2"]),
        (["--method", "raw@0", "--layer", "1"], ["not both"]),
        (["--method", "raw", "raw"], ["needs a name of its own"]),
        (["--colormap", "virdis"], ["no colormap 'virdis'", "viridis"]),
        (["--alpha", "2"], ["alpha and saturation must be in [0, 1]"]),
        (["--top", "0"], ["hottest pixels must be in (0, 1]"]),
        (["--target", "tabby"], ["the model has no class 'tabby'"]),
        (["--fps", "0"], ["fps must be > 0"]),
        (["--devices", "0"], ["--devices must be ≥ 1"]),
        (["--strategy", "dpp"], ["invalid choice: 'dpp'"]),
        (["--images", "nothing/*.jpg"], ["nothing matches", "quote a pattern"]),
    ],
)
def test_overlay_names_what_cannot_be_done(flags, parts, photo_folder, tmp_path, capsys):
    images = [] if "--images" in flags else ["--images", str(photo_folder / "class0")]
    command = ["overlay", *images, "--out", str(tmp_path / "out"), "--model", "test_vit", "--weights", "random", *flags]
    fails(command, 2, *parts, capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_overlay_ends_with_its_page(photo_folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["overlay", "--images", str(photo_folder / "class0"), "--out", str(out), "--model", "test_vit"]
    command += ["--weights", "random", "--method", "raw", "rollout", "--page"]
    assert main(command) == 0
    assert re.search(rf"\n  {out}/index.html   \d\.\d MB   (\d+) images\n$", capsys.readouterr().out)
    page = out / "index.html"
    pictures = json.loads(re.search(r'id="facts">(.*?)</script>', page.read_text(), re.S)[1])["pictures"]
    assert {one["name"] for one in pictures} == {path.name for path in (photo_folder / "class0").iterdir()}
    assert {one["name"] for one in pictures[0]["heatmaps"] if not one["control"]} == {"raw", "rollout"}
    before = page.stat().st_mtime_ns
    assert main(command) == 0
    assert capsys.readouterr().out.endswith(f"  {page}   as before\n")
    assert page.stat().st_mtime_ns == before
    page.write_text("mine")
    fails(command, 2, "index.html exists and is no page of explore's", capsys=capsys)
    fails([*command[:5], "--compare", "a", "b", "--page"], 2, "--page shows one model", capsys=capsys)


def test_compared_checkpoints_have_names_that_tell_them_apart(capsys):
    from visionattn.cli import _telling

    assert _telling(["runs/a.ckpt", "runs/b.ckpt"]) == ["a", "b"]
    assert _telling(["runs/a/0/best.ckpt", "runs/b/0/best.ckpt"]) == ["a", "b"]
    assert _telling(["runs/a/0/best.ckpt", "runs/b/1/best.ckpt"]) == ["a/0", "b/1"]
    fails(["overlay", "--images", ".", "--out", "x", "--compare", "a.ckpt", "a.ckpt"], 2, "with itself", capsys=capsys)


@pytest.mark.parametrize(("model", "layer"), [("test_vit", "attention of blocks"), ("test_resnet", "layer")])
def test_overlays_of_a_timm_model(model, layer, photo_folder, tmp_path, capsys):
    flags = ["--images", str(photo_folder / "class0"), "--out", str(tmp_path), "--model", model, "--weights", "random"]
    assert main(["overlay", *flags, "--batch-size", "5"]) == 0
    assert f"pointing at: {layer}" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.jpg"))) == 12
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert main(["overlay", *flags]) == 0
    assert "12 as before" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (["--model", "vit_smal_patch16_224"], 2, ["timm has no model 'vit_smal_patch16_224'", "vit_small_patch16_224"]),
        (["--model", "test_vit", "--weights", "random", "--method", "rolout"], 2, ["no method 'rolout'", "rollout"]),
        (["--model", "test_vit", "--weights", "random", "--method", "rollout", "--layer", "x"], 2, ["takes no layer"]),
        (
            ["--model", "test_vit", "--weights", "random", "--method", "raw", "--layer", "blocks.9"],
            2,
            ["blocks.5.attn"],
        ),
        (["--ckpt", "nothing.ckpt"], 1, ["there is no checkpoint nothing.ckpt"]),
        (["--ckpt", "a", "--weights", "b"], 2, ["--weights goes with --model"]),
        (["--ckpt", "a", "--batchsize", "3"], 2, ["no option --batchsize", "--batch-size"]),
        ([], 2, ["--ckpt", "--model", "required"]),
    ],
)
def test_overlay_says_what_is_wrong(flags, code, parts, photo_folder, tmp_path, capsys):
    command = ["overlay", "--images", str(photo_folder / "class0"), "--out", str(tmp_path / "out"), *flags]
    fails(command, code, *parts, capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_a_method_that_does_not_fit_is_told_before_the_first_epoch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--model.network.attention=visionattn.attention.ECA", *SMALL]
    fails(["fit", "--config", QUICKSTART, *flags], 2, "gates over channels only", "Methods that fit", capsys=capsys)
    assert not list(tmp_path.rglob("*.ckpt"))


# score -------------------------------------------------------------------------------------------------------------


def test_methods_of_a_checkpoint_are_scored_on_the_test_images_of_its_config(quick_run, tmp_path, capsys):
    command = ["score", "--ckpt", str(quick_run / "best.ckpt"), "--data", str(quick_run / "config.yaml")]
    flags = ["--images", "16", "--steps", "4", "--method", "gradcam", "gate@blocks.0", "rollout"]
    assert main([*command, *flags, "--out", str(tmp_path / "scores.json")]) == 1  # rollout does not fit
    told = capsys.readouterr().out
    assert "rollout is left out: rollout needs attention over positions" in told
    assert max(len(line) for line in told.splitlines() if "left out" not in line and "figures:" not in line) <= 80
    lines = {line.split()[1]: line for line in told.splitlines() if line[:1] in "✓✗"}
    assert lines.keys() == {"gradcam", "gate@blocks.0"}
    for title in ("deletion", "insertion", "pointing", "energy", "IoU", "shuffled"):
        assert title in told
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["paths"] == [f"digits/test/{index:06d}.png" for index in range(0, 64, 4)]  # evenly
    assert written["controls"]["gate@blocks.0"] == ["random 16×16", "centre", "edges 16×16"]
    for figure in written["figures"]:
        of_images = written["of_images"][figure["name"]][figure["figure"]]
        assert len(of_images) == 16
        assert figure["value"] == pytest.approx(np.mean(of_images), abs=1e-6)
        assert figure["low"] <= figure["value"] <= figure["high"]
        if figure["kind"] == "method":
            assert ("✗" in lines[figure["name"]]) >= (not figure["beats_controls"])
    crosses = sum(line.count("✗") for line in lines.values())
    lost = [figure for figure in written["figures"] if figure["beats_controls"] is False]
    assert crosses == len(lost) + len({figure["name"] for figure in lost})


def test_methods_of_a_timm_model_are_scored_on_a_folder(photo_folder, tmp_path, capsys):
    command = ["score", "--model", "test_vit", "--weights", "random", "--data", str(photo_folder)]
    flags = ["--steps", "2", "--method", "raw", "chefer", "--images", "11", "--batch-size", "4"]
    out = tmp_path / "scores.csv"
    assert main([*command, *flags, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "pointing" not in told
    assert "over 11 images\n" in told  # and nothing of labels
    with open(out) as file:
        rows = list(csv.DictReader(file))
    assert {row["figure"] for row in rows} == {"deletion", "insertion", "shuffled"}
    assert [row["name"] for row in rows if row["figure"] == "deletion"][:2] == ["raw", "chefer"]
    before = out.read_text()
    assert main([*command, *flags, "--out", str(out)]) == 0
    assert out.read_text() == before


def test_images_that_cannot_be_read_are_told_and_the_others_scored(photo_folder, tmp_path, capsys):
    for index in range(5):
        (tmp_path / f"{index}.jpg").write_bytes(b"no image")
    command = ["score", "--model", "test_vit", "--weights", "random", "--steps", "2", "--method", "raw"]
    assert main([*command, "--data", str(tmp_path), str(photo_folder / "class0" / "0.png"), "--batch-size", "2"]) == 1
    told = capsys.readouterr().out
    assert "0.jpg is no image that can be read" in told
    assert "and 2 more that cannot be read" in told
    assert "1 of 10 images that an interval takes" in told
    assert "✗" not in told
    assert "±" not in told
    fails([*command, "--data", str(tmp_path)], 1, "there are no images to score", capsys=capsys)


def test_the_images_are_taken_evenly():
    from visionattn.scorecard import evenly

    assert evenly(10, 5) == [0, 2, 4, 6, 8]
    assert evenly(3, 200) == [0, 1, 2]
    assert np.bincount(np.array(evenly(1000, 200)) // 100).tolist() == [20] * 10


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (["--method", "rolout"], 2, ["no method 'rolout'", "rollout"]),
        (["--method", "rollout@blocks.0"], 2, ["rollout combines all layers"]),
        (["--method", "raw@blocks.9"], 2, ["blocks.5.attn"]),
        (["--method", "gradcam@2"], 2, ["no layer '2'"]),
        (["--method", "raw@--1"], 2, ["nothing attends in '--1'"]),
        (["--seed", "-1"], 2, ["seed must be in"]),
        (["--data", "digits.yaml"], 2, ["digits.yaml prepares its images otherwise", "--data FOLDER"]),
        (["--images", "0"], 2, ["--images must be ≥ 1"]),
        (["--steps", "0"], 2, ["--steps must be ≥ 1"]),
        (["--steps", "99999"], 2, ["steps must be in [1, 25600]"]),
        (["--out", "scores.txt"], 2, ["--out must end in .csv or .json"]),
        (["--out", "nowhere/scores.csv"], 2, ["there is no folder nowhere"]),
        (["--data", "nothing"], 2, ["there is no", "nothing"]),
        (["--data", "nothing.yaml"], 2, ["there is no config nothing.yaml"]),
        (["--data", "empty"], 1, ["there is no image in empty"]),
        (["--data", "plain.yaml"], 2, ["plain.yaml has no data section"]),
        (["--data", "broken.yaml"], 2, ["broken.yaml is no YAML"]),
        (["--data", "typo.yaml"], 2, ["ClutteredDigitsData has no option 'batchsize'", "batch_size"]),
        (["--data", "wrong.yaml"], 2, ["batch_size must be ≥ 1"]),
        (["--data", "gone.yaml"], 1, ["there is no folder gone"]),
    ],
)
def test_score_says_what_is_wrong(flags, code, parts, photo_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    digits = "data: {class_path: visionattn.data.ClutteredDigitsData, init_args: {%s}}"
    (tmp_path / "plain.yaml").write_text("trainer: {max_epochs: 1}")
    (tmp_path / "broken.yaml").write_text("data: {")
    (tmp_path / "digits.yaml").write_text(digits % "")
    (tmp_path / "typo.yaml").write_text(digits % "batchsize: 3")
    (tmp_path / "wrong.yaml").write_text(digits % "batch_size: 0")
    (tmp_path / "gone.yaml").write_text("data: {class_path: visionattn.data.ImageFolderData, init_args: {root: gone}}")
    data = [] if "--data" in flags else ["--data", str(photo_folder)]
    command = ["score", "--model", "test_vit", "--weights", "random", *data, *flags]
    fails(command, code, *parts, capsys=capsys)


def test_weights_that_are_not_finite_are_named(photo_folder, tmp_path, capsys):
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("test_vit")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights["norm.weight"][0] = torch.nan
    save_file(weights, tmp_path / "nan.safetensors")
    command = ["score", "--model", "test_vit", "--weights", str(tmp_path / "nan.safetensors"), "--method", "raw"]
    fails([*command, "--data", str(photo_folder)], 1, "norm.weight holds NaN", capsys=capsys)
