"""Test that checkpoints restore the task, and that reading a checkpoint never runs code from it."""

import pickle
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from tests.conftest import CONFIGS
from tests.refusals import refuses
from visionattn.cli import main
from visionattn.errors import DataError, UsageError
from visionattn.models.sources.transformers_source import architecture_of
from visionattn.training import load
from visionattn.training.checkpoints import _shape_options, check_against


@pytest.fixture
def content(quick_run):
    return torch.load(quick_run / "best.ckpt", weights_only=True)


def test_loaded_task_has_the_accuracy_of_the_trained_task(quick_run):
    from visionattn.data import ClutteredDigits

    task = load(quick_run / "best.ckpt")
    assert not task.training
    assert task.class_names == tuple("0123456789")
    data = ClutteredDigits("test", size=64, fragments=_fragments(), preprocess=task.preprocess)
    samples = [data[index] for index in range(64)]
    with torch.no_grad():
        answers = task(torch.stack([sample["image"] for sample in samples])).argmax(1)
    accuracy = (answers == torch.tensor([sample["label"] for sample in samples])).float().mean()
    metrics = dict(line.split(",") for line in (quick_run / "test.csv").read_text().split())
    assert float(metrics["accuracy"]) == pytest.approx(float(accuracy))


def test_a_checkpoint_of_another_task_is_refused_as_a_wrong_call(quick_run):
    model = {"class_path": "visionattn.tasks.Detection", "init_args": {}}
    message = (
        "is a checkpoint of visionattn.tasks.Classification, but the config has visionattn.tasks.Detection; use the"
    )
    refuses(UsageError, message, check_against, quick_run / "best.ckpt", model)


def test_alternating_window_shifts_are_restored_from_the_checkpoint(photo_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = [f"--config={CONFIGS / 'vit' / name}.yaml" for name in ("dense", "windowed")]
    limits = [f"--trainer.limit_{split}_batches=1" for split in ("train", "val")]
    flags = [*limits, "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--test_after_fit=false"]
    data = [f"--data.root={photo_folder}", "--data.num_workers=0", "--data.batch_size=4"]
    assert main(["fit", *configs, *flags, *data, "--model.network.num_classes=5"]) == 0
    run = Path("runs/vit-windowed/0")
    blocks = load(run / "best.ckpt").network.backbone.blocks
    assert [block.attn.mechanism.shift for block in blocks] == [0, 2, 0, 2]
    assert main(["validate", f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'best.ckpt'}"]) == 0


def _fragments():
    from visionattn.data import ClutteredDigitsData

    return ClutteredDigitsData()._options["fragments"]


def test_torch_reads_a_checkpoint_with_weights_only(content):
    assert {"state_dict", "optimizer_states", "visionattn"} <= content.keys()


@pytest.mark.parametrize(
    "class_path", ["os.system", "subprocess.Popen", "visionattn.cli.sys", "builtins.eval", "visionattn.data.read_image"]
)
def test_checkpoint_with_untrusted_classes_is_refused(class_path, content, tmp_path):
    network = {"class_path": class_path, "init_args": {}}
    content["visionattn"]["model"]["init_args"]["network"] = network
    torch.save(content, tmp_path / "x.ckpt")
    refuses(DataError, f"{class_path}, which", lambda: load(tmp_path / "x.ckpt"))


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):  # unpickling would create the file `ran`
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"state_dict": Evil(), "visionattn": {}}, tmp_path / "x.ckpt")
    refuses(DataError, "it contains code", lambda: load(tmp_path / "x.ckpt"))
    (tmp_path / "y.ckpt").write_bytes(pickle.dumps(Evil()))
    refuses(DataError, "cannot be read as a checkpoint", lambda: load(tmp_path / "y.ckpt"))
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoints_are_refused_with_the_reason(content, quick_run, tmp_path):
    def fails(message, name="x.ckpt"):
        refuses(DataError, message, lambda: load(tmp_path / name))

    fails("there is no checkpoint", "nothing.ckpt")
    whole = (quick_run / "best.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(whole[: len(whole) // 2])
    fails("cut short or another kind of file")
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    fails("not written by visionattn")
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    fails(r"x\.ckpt cannot be read as a checkpoint: it is a pickle, .* write it again")
    del content["visionattn"]
    torch.save(content, tmp_path / "x.ckpt")
    fails("a checkpoint of Lightning without the description of its task .* give its network as --model")
    content = torch.load(quick_run / "best.ckpt", weights_only=True)
    content["visionattn"]["model"]["class_path"] = "torch.nn.ReLU"
    content["visionattn"]["model"]["init_args"] = {}
    torch.save(content, tmp_path / "x.ckpt")
    fails("describes a ReLU, which is not a LightningModule|cannot be built")


TASK = "visionattn.tasks.Classification"


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("model", None, r"visionattn\.model has no class_path"),
        ("model", {"class_path": 3}, r"visionattn\.model\.class_path is not a name"),
        ("model", {"class_path": TASK, "init_args": [1]}, r"visionattn\.model\.init_args does not map"),
        ("model", {"class_path": TASK, "init_args": {"x": [{"class_path": "y", "init_args": 3}]}}, r"x\.0\.init_args"),
        ("class_names", "abc", "class_names is not a list of names"),
        ("preprocess", [1], "preprocess does not map options to values"),
        ("preprocess", {"size": "x"}, "describes a preprocessing that cannot be used"),
        ("state_dict", [1], "state_dict does not map names to tensors"),
    ],
)
def test_malformed_part_of_a_checkpoint_is_named(part, value, message, content, tmp_path):
    (content if part == "state_dict" else content["visionattn"])[part] = value
    torch.save(content, tmp_path / "x.ckpt")
    refuses(DataError, rf"x\.ckpt .*{message}", load, tmp_path / "x.ckpt")


def test_architectures_of_every_type_of_transformers_are_accepted_and_places_are_refused():
    """A checkpoint names the type, e.g. `data2vec-vision`, and the fields of its configuration."""
    for kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        fields = architecture_of(transformers.AutoConfig.for_model(kind).to_dict())
        # releases before 5 write vit-hybrid for vit_hybrid
        assert _shape_options(fields, "x.ckpt")["model_type"].replace("-", "_") == kind.replace("-", "_")
    for place in ("hf-hub:owner/name", "local-dir:x", "../x", "x.pth", "-x", "", "x\n"):
        refuses(DataError, "gives the option model_type = ", _shape_options, {"model_type": place}, "x.ckpt")


def test_missing_weight_is_named(content, tmp_path):
    del content["state_dict"]["network.head.bias"]
    torch.save(content, tmp_path / "x.ckpt")
    refuses(DataError, r"network\.head\.bias", lambda: load(tmp_path / "x.ckpt"))


@pytest.mark.parametrize("address", ["http://example.invalid/x.ckpt", "https://x/y.ckpt", "s3://x/y.ckpt", "file:///x"])
def test_address_is_refused_as_a_checkpoint(address, quick_run, monkeypatch, capsys):
    from visionattn.cli import main

    def connect(*_):
        raise AssertionError("the command opened a network connection")

    monkeypatch.setattr("socket.socket.connect", connect)
    assert main(["test", "--config", str(quick_run / "config.yaml"), "--ckpt_path", address]) == 2
    assert "is an address" in capsys.readouterr().err
    refuses(UsageError, "is an address", load, address)
