"""Checkpoints that the command line writes, tests, predicts with and compares with flags."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.commands.command_line import QUICKSTART, fails
from tests.conftest import CONFIGS, SMALL
from tests.data.annotated import GAPS, NAMES, coco
from visionattn.cli import main


def test_detection_writes_metrics_overlays_and_predictions(tmp_path, monkeypatch, capsys):
    """Run fit, predict, overlay, explore and score of a detector on data in COCO's layout."""
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

    exchange = {3: 90, 17: 17, 90: 3}
    for file in (root / "annotations").iterdir():  # exchange the ids of cats and eels, as another tool might
        content = json.loads(file.read_text())
        for category in content["categories"]:
            category["id"] = exchange[category["id"]]
        for annotation in content["annotations"]:
            annotation["category_id"] = exchange[annotation["category_id"]]
        file.write_text(json.dumps(content))
    capsys.readouterr()
    assert main(command) == 0
    assert "the data has the model's classes in another order; they are matched by name" in capsys.readouterr().err
    exchanged = json.loads(Path("runs/bccd-dense/2/predictions.json").read_text())
    assert [{**result, "category_id": exchange[result["category_id"]]} for result in exchanged] == results
    for file in (root / "annotations").iterdir():
        file.write_text(file.read_text().replace('"cat"', '"zebra"'))
    message = "the data has no 'cat' and the model has no 'zebra'"
    for verb, checkpoint in (("predict", "best"), ("validate", "best"), ("fit", "last")):
        fails([verb, command[1], f"--ckpt_path={run / checkpoint}.ckpt"], 1, message, capsys=capsys)


def test_attention_inserted_from_yaml_is_restored_from_the_checkpoint(tmp_path, monkeypatch, capsys):
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
    assert all(abs(gamma) > 1e-3 for gamma in gammas.values())  # gamma starts at 0, so training has changed it
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
    from visionattn.attention.self_attention import token_reduction as tokens
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
    of_run = ["--config", str(run / "config.yaml"), f"--ckpt_path={run / 'best.ckpt'}"]
    fewer = ["--model.network.tokens=visionattn.attention.TokenMerging", "--model.network.tokens.rate=3"]
    fails(["fit", *of_run, *fewer], 2, "tokens.init_args.rate is 3 in the config and not set in", capsys=capsys)
    merged, plain = [], tokens.most_similar_pairs
    monkeypatch.setattr(tokens, "most_similar_pairs", lambda *args: merged.append(args) or plain(*args))
    assert main(["test", *of_run, *fewer, "--name=fewer"]) == 0
    assert len(merged) >= 4  # tokens were merged in two blocks for two batches
    assert Path("runs/fewer/0/test.csv").exists()
    content = torch.load(run / "best.ckpt", weights_only=True)
    merging = {"class_path": "visionattn.attention.TokenMerging", "init_args": {"rate": [3, 2]}}
    content["visionattn"]["model"]["init_args"]["network"]["init_args"]["tokens"] = merging
    torch.save(content, "merged.ckpt")  # like the checkpoint of a run with TokenMerging in its config
    network = load("merged.ckpt").network.backbone
    assert network.forward_features(torch.randn(2, 3, 64, 64)).shape == (2, 1 + 16 - 3 - 2, 24)


def test_test_validate_and_predict_need_trained_weights(quick_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for verb in ("test", "validate", "predict"):
        fails([verb, "--config", QUICKSTART], 2, "needs trained weights", "--ckpt_path untrained", capsys=capsys)
    assert main(["validate", "--config", QUICKSTART, "--ckpt_path=untrained", *SMALL]) == 0


def test_testing_again_gives_the_same_scores_and_predict_lists_every_image(quick_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(quick_run / "config.yaml")
    assert main(["test", "--config", config, f"--ckpt_path={quick_run / 'best.ckpt'}"]) == 0
    second_test = tmp_path / "runs" / "quickstart" / "0" / "test.csv"
    assert second_test.read_text() == (quick_run / "test.csv").read_text()

    assert main(["predict", "--config", config, f"--ckpt_path={quick_run / 'best.ckpt'}"]) == 0
    with open(tmp_path / "runs" / "quickstart" / "1" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"digits/test/{index:06d}.png" for index in range(64)]


def test_exported_weights_and_weights_of_the_hub_are_tested_but_not_continued(
    quick_run, shelf, tmp_path, monkeypatch, capsys
):
    from visionattn.training import export, push

    monkeypatch.chdir(tmp_path)
    config = ["--config", str(quick_run / "config.yaml")]
    export(quick_run / "best.ckpt", "digits.safetensors")
    push(quick_run / "best.ckpt", "me/digits")
    for number, path in enumerate(("digits.safetensors", "hf://me/digits")):
        assert main(["test", *config, f"--ckpt_path={path}"]) == 0
        tested = Path(f"runs/quickstart/{number}/test.csv")
        assert tested.read_text() == (quick_run / "test.csv").read_text()
        fails(["fit", *config, f"--ckpt_path={path}"], 2, "fit cannot continue from", ".safetensors", capsys=capsys)


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--model.optimizer.lr=0.5", "model.init_args.optimizer.init_args.lr is 0.5 in the config and 0.015 in"),
        (
            "--model.network.attention=visionattn.attention.ECA",
            "visionattn.attention.ECA' in the config and 'visionattn.attention.CBAM",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "test"])
def test_error_names_a_flag_that_contradicts_the_checkpoint(verb, flag, part, quick_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = (quick_run / "best.ckpt").read_bytes()
    checkpoint = f"--ckpt_path={quick_run / 'best.ckpt'}"
    fails([verb, "--config", str(quick_run / "config.yaml"), checkpoint, flag], 2, part, capsys=capsys)
    assert (quick_run / "best.ckpt").read_bytes() == before
