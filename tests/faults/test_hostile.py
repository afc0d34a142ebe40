"""Test files from untrusted sources: no code is run, no file is written outside the output folder, nothing crashes."""

import io
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, features

from tests.faults.conftest import ROOT
from tests.refusals import refuses
from visionattn.data import read_image
from visionattn.errors import DataError, UsageError
from visionattn.models import Classifier
from visionattn.training import load

LIGHTNING = ("fit", "validate", "test", "predict")
OWN = ("overlay", "explore", "score", "export")  # all other verbs with the option --ckpt


class CallOnUnpickling:
    """An object that calls `function` when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_checkpoints(folder, content):
    """Write damaged and hostile variants of a checkpoint; return name → path. Hostile code creates the file `ran`."""
    ran = str(folder / "ran")
    (folder / "evil_module.py").write_text(f"open({ran!r}, 'w')\nclass Net: pass\n")
    code = f"open({ran!r}, 'w').write('x')"
    calls = {
        "system": CallOnUnpickling(os.system, f"touch {ran}"), "open": CallOnUnpickling(open, ran, "w"),
        "exec": CallOnUnpickling(exec, code), "eval": CallOnUnpickling(eval, code),
        "import": CallOnUnpickling(__import__, "evil_module"), "compile": CallOnUnpickling(compile, code, "x", "exec"),
        "load": CallOnUnpickling(torch.load, ran), "hub": CallOnUnpickling(torch.hub.load, "a/b", "c"),
        "numpy": CallOnUnpickling(np.load, ran),
    }  # fmt: skip
    files = {}

    def save(name, content, **options):
        files[name] = folder / f"{name}.ckpt"
        torch.save(content, files[name], **options)

    for name, call in calls.items():
        save(f"{name}_in_state", {**content, "state_dict": {**content["state_dict"], "x": call}})
        save(f"{name}_in_entry", {**content, "visionattn": call})
    save("old_format", {**content, "x": calls["open"]}, _use_new_zipfile_serialization=False)
    save("old_format_of_plain_data", content, _use_new_zipfile_serialization=False)
    files["pickle"] = folder / "pickle.ckpt"
    files["pickle"].write_bytes(pickle.dumps(calls["open"]))

    def save_with_network(name, network):
        model = json.loads(json.dumps(content["visionattn"]["model"]))
        model["init_args"]["network"] = network
        save(name, {**content, "visionattn": {**content["visionattn"], "model": model}})

    for path in (
        "evil_module.Net", "os.system", "builtins.exec", "subprocess.Popen", "torch.hub.load", "visionattn.cli.sys",
        "torch.utils.collect_env.run", "torchvision.datasets.utils.download_url", "timm.create_model", "torch.nn.os",
        "timm.task.distillation.DistillationTeacher",
    ):  # fmt: skip
        save_with_network(f"names_{path}", {"class_path": path, "init_args": {}})
    weights = folder / "weights.pth"
    weights.write_bytes(pickle.dumps(calls["open"]))
    for key, option in (("checkpoint_path", str(weights)), ("norm_layer", "evil_module.Net"), ("x", {"file": "y"})):
        options = {"backbone": "test_resnet", "num_classes": 10, "options": {key: option}}
        save_with_network(f"names_option_{key}", {"class_path": "visionattn.models.Classifier", "init_args": options})
    hyper = {"_class_path": "evil_module.Net", "_instantiator": "evil_module.Net", "lr": 1}
    save("hyper_parameters", {**content, "hyper_parameters": hyper})
    save("names_untrusted_task", {**content, "visionattn": {"model": {"class_path": "evil_module.Net"}}})

    whole = io.BytesIO()
    torch.save(content, whole)
    for part in (0, 1, 100, len(whole.getvalue()) // 2, len(whole.getvalue()) - 100, len(whole.getvalue()) - 1):
        files[f"cut_{part}"] = folder / f"cut_{part}.ckpt"
        files[f"cut_{part}"].write_bytes(whole.getvalue()[:part])
    files["bomb"] = folder / "bomb.ckpt"  # small, but unpacks to 256 MiB
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(files["bomb"], "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
        target.writestr("archive/data/999", b"\0" * (1 << 28))
    return files


@pytest.fixture(scope="module")
def hostile(quick_run, tmp_path_factory):
    """Write hostile variants of the quickstart's checkpoint; return name → path, and their folder."""
    folder = tmp_path_factory.mktemp("hostile")
    return hostile_checkpoints(folder, torch.load(quick_run / "best.ckpt", weights_only=True)), folder


def test_load_runs_no_code_of_a_checkpoint(hostile, quick_run, monkeypatch):
    files, folder = hostile
    assert len(files) == 44
    monkeypatch.syspath_prepend(folder)
    load(quick_run / "best.ckpt")  # imports all modules that loading needs, before they are listed
    before = set(sys.modules)
    for name, path in files.items():
        if name == "hyper_parameters":
            load(path)  # `load` does not use Lightning's hyper-parameters
            continue
        with pytest.raises(DataError) as raised:
            load(path)
        assert str(path) in str(raised.value)
        assert len(str(raised.value)) < 600
    assert set(sys.modules) - before <= {"encodings.cp437"}  # the standard library's zipfile needs this encoding
    assert not (folder / "ran").exists()


OPENS = """
import sys
from pathlib import Path
from visionattn.training import load

path, *variants = sys.argv[1:]
load(path)  # imports what loading needs
opened = []

def hook(event, arguments):
    if event == "open" or event.startswith(("socket.", "subprocess.", "os.")):
        opened.append(f"{event} {arguments[0]}")

sys.addaudithook(hook)
for variant in variants:
    opened.clear()
    load(variant)
    found = opened[:]
    assert any(variant in line for line in found), found  # the hook hears what torch opens
    print([line for line in found if variant not in line])
"""


def test_loading_opens_only_the_checkpoint_and_ignores_options_that_load_weights(tmp_path):
    ran, weights = tmp_path / "ran", str(tmp_path / "weights.pth")
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(CallOnUnpickling(open, str(ran), "w")))
    network = Classifier("test_resnet", num_classes=2)
    names = ("checkpoint_path", "cache_dir", "hf_hub_id", "pretrained_strict")
    variants = {name: {name: weights} for name in names}
    variants |= {name: {name: {"file": weights}} for name in ("pretrained_cfg", "pretrained_cfg_overlay")}
    for name, options in {"plain": {}, **variants}.items():
        args = {"backbone": "test_resnet", "num_classes": 2, "options": options, "pretrained": True}
        model = {
            "class_path": "visionattn.tasks.Classification",
            "init_args": {"network": {"class_path": "visionattn.models.Classifier", "init_args": args}},
        }
        state = {f"network.{key}": tensor for key, tensor in network.state_dict().items()}
        entry = {"model": model, "class_names": ["a", "b"], "preprocess": None}
        torch.save({"state_dict": state, "visionattn": entry}, tmp_path / f"{name}.ckpt")
    files = [str(tmp_path / f"{name}.ckpt") for name in ("plain", *variants)]
    done = subprocess.run([sys.executable, "-c", OPENS, *files], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split("\n") == ["[]"] * len(variants) + [""]
    assert not ran.exists()


def command_line(verb, path, quick_run, folder):
    """Return a command line that reads the checkpoint `path`."""
    if verb in LIGHTNING:
        return [verb, "--config", str(quick_run / "config.yaml"), "--ckpt_path", str(path)]
    if verb == "overlay":
        return [verb, "--images", str(folder), "--out", str(folder / "out"), "--ckpt", str(path)]
    if verb == "explore":
        return [verb, "--images", str(folder), "--out", str(folder / "page.html"), "--ckpt", str(path)]
    if verb == "score":
        return [verb, "--data", str(folder), "--ckpt", str(path)]
    return [verb, "--ckpt", str(path), "--out", str(folder / "x.safetensors")]


@pytest.mark.parametrize("verb", [*LIGHTNING, *OWN])
@pytest.mark.parametrize("count", [3, pytest.param(44, marks=pytest.mark.slow)])
def test_no_verb_runs_code_of_a_checkpoint(verb, count, hostile, quick_run, server, tmp_path):
    files, folder = hostile
    Image.new("RGB", (8, 8)).save(folder / "image.png")
    names = ["open_in_state", "names_evil_module.Net", "bomb"] if count < len(files) else list(files)
    commands = {name: command_line(verb, files[name], quick_run, folder) for name in names}
    if verb in OWN:
        commands.pop("hyper_parameters", None)  # these verbs do not use Lightning's hyper-parameters
    if verb == "export":  # copies the names of classes without building objects
        commands = {name: command for name, command in commands.items() if not name.startswith("names_")}
    fault = f"run_all({list(commands.values())!r}, {str(folder)!r})"
    ended = server.run([], tmp_path, fault=fault)
    results = json.loads(ended.output.splitlines()[-1])
    assert [code for code, _, _ in results] == [1] * len(commands) or verb in LIGHTNING
    assert all(code in (1, 2) for code, _, _ in results)  # 2: the checkpoint's model differs from the config's
    assert all(".ckpt" in output for _, output, _ in results)
    assert [modules for _, _, modules in results if modules] == []
    assert not (folder / "ran").exists()


def image_files():
    """Return name → bytes of images in all formats and modes that Pillow writes, odd images, and other files."""
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 255, (24, 32, 3), dtype=np.uint8))
    files = {}
    exif = b"Exif\0\0II*\0"
    rotated = exif + b"\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"

    def add(name, image, **options):
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.save(buffer, **options)
        files[name] = buffer.getvalue()

    modes_by_format = {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
        "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16"),
        "BMP": ("1", "L", "P", "RGB", "RGBA"), "GIF": ("L", "P", "RGB"), "WEBP": ("RGB", "RGBA"),
        "PPM": ("1", "L", "RGB"), "TGA": ("L", "RGB", "RGBA"), "ICO": ("RGBA",), "PCX": ("L", "P", "RGB"),
        "SGI": ("L", "RGB"), "IM": ("L", "RGB"),
    }  # fmt: skip
    for kind, modes in modes_by_format.items():
        for mode in modes:
            if mode == "I;16":
                image = Image.fromarray((np.arange(24 * 32).reshape(24, 32) * 80).astype(np.uint16))
            else:
                image = picture.convert("RGB" if mode == "LAB" else mode if mode != "LA" else "L")
                image = image.convert("LA") if mode == "LA" else image
            if mode == "LAB":
                image = Image.merge("LAB", picture.split())
            add(f"{kind}_{mode}", image, format=kind)
    for kind, feature in (("AVIF", "avif"), ("JPEG2000", "jpg_2000")):
        if features.check(feature):
            add(kind, picture, format=kind)
    add("progressive", picture, format="JPEG", progressive=True)
    add("animation", picture, format="GIF", save_all=True, append_images=[picture.rotate(90)])
    add("animated_png", picture, format="PNG", save_all=True, append_images=[picture.rotate(90)])
    add("rotated", picture, format="JPEG", exif=rotated)
    add("bad_exif", picture, format="JPEG", exif=exif + b"\xff\xff\xff\xff")
    add("one_pixel", picture.crop((0, 0, 1, 1)), format="PNG")
    add("one_row", picture.resize((5000, 1)), format="PNG")
    add("bomb", Image.new("1", (30_000, 30_000)), format="PNG")  # a small file with more pixels than the limit
    files |= {"empty": b"", "text": b"hello", "zeros": bytes(1000), "zip": b"PK\x03\x04" + bytes(100)}
    files |= {"svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n"}
    return files


def reason_for_refusal(content, path):
    """Return None if the image can be read as RGB, otherwise the error message, and a note if the file is not named."""
    path.write_bytes(content)
    try:
        read = read_image(path)
    except DataError as error:
        reason = str(error)
        return reason if str(path) in reason else f"does not name its file: {reason}"
    assert read.dtype == np.uint8
    assert read.ndim == 3
    assert read.shape[2] == 3
    return None


def max_memory():
    """Return the maximum memory that this process has used so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def test_every_kind_of_image_is_read_or_refused_with_a_reason(tmp_path):
    files = image_files()
    assert len(files) >= 60
    before = max_memory()
    reasons = {name: reason_for_refusal(content, tmp_path / f"{name}.x") for name, content in files.items()}
    assert max_memory() - before < 1
    assert not [reason for reason in reasons.values() if reason and "does not name" in reason]
    refused = {name for name, reason in reasons.items() if reason}
    assert {"empty", "text", "zeros", "zip", "svg", "postscript", "bomb"} <= refused
    assert len(refused) <= 8, reasons


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_damage_to_an_image_crashes_the_decoder(count, tmp_path):
    files = {name: content for name, content in image_files().items() if content and name != "bomb"}
    names, before = sorted(files), max_memory()
    for seed in range(count):
        generator = random.Random(seed)
        content = bytearray(files[names[seed % len(names)]])
        match seed % 4:
            case 0:  # change up to eight bytes
                for _ in range(generator.randint(1, 8)):
                    content[generator.randrange(len(content))] = generator.randrange(256)
            case 1:  # change a bit of the header
                content[generator.randrange(min(64, len(content)))] ^= 1 << generator.randrange(8)
            case 2:  # cut off the end
                del content[generator.randrange(len(content)) :]
            case _:  # repeat a part
                place = generator.randrange(len(content))
                content[place:place] = content[place // 2 : place]
        assert "does not name" not in (reason_for_refusal(bytes(content), tmp_path / "x") or "")
    assert max_memory() - before < 1


def test_outputs_of_odd_image_names_stay_in_the_output_folder(server, tmp_path):
    """The manifest has every image once. No file outside the output folder is created, and no file is overwritten."""
    home, outside = tmp_path / "home", tmp_path / "outside"
    images = home / "in"
    images.mkdir(parents=True)
    outside.mkdir()
    (outside / "mine.png").write_bytes(b"mine")
    content = image_files()["PNG_RGB"]
    names = [
        "a..b.png", "-rf.png", "--out.png", "a\nb.png", "a\tb.png", "a\x1b[31m.png", "\u00e9.png", "e\u0301.png",
        "X.png", "x.png", "x.PNG", "$(touch ran).png", "<b>&.png", "'\".png", " .png", "%2e%2e%2f.png", "con.png",
        "é" * 125 + ".png", "a" * 251 + ".png", "a" * 250 + "b.jpg", "manifest.jsonl.png",
    ]  # fmt: skip
    for name in names:
        (images / name).write_bytes(content)
    (images / os.fsdecode(b"\xff\xfe.png")).write_bytes(content)
    (images / "sub").mkdir()
    (images / "sub" / "loop").symlink_to(images)
    (images / "sub" / "x.png").symlink_to(outside / "mine.png")
    (images / "out_of_the_tree").symlink_to(outside)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    command = ["overlay", "--images", "in", "--out", "out", "--model", "test_vit", "--weights", "random"]
    ended = server.run(command, home)
    assert ended.code == 1, ended.output  # because sub/x.png is not an image
    entries = [json.loads(line) for line in (home / "out" / "manifest.jsonl").read_bytes().splitlines()]
    assert len(entries) == len({entry["source"] for entry in entries}) == len(names) + 2
    assert [entry["source"] for entry in entries if entry["status"] == "failed"] == [str(images / "sub" / "x.png")]
    assert {path: path.read_bytes() for path in before} == before
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before.keys()
    assert all(home / "out" in path.parents for path in new)
    outputs = {os.path.join(home, "out", entry["outputs"]["overlay"]) for entry in entries if "outputs" in entry}
    assert len(outputs) == len(names) + 1
    assert outputs | {str(home / "out" / "manifest.jsonl")} == {str(path) for path in new}
    assert "\x1b" not in ended.output


def test_an_architecture_in_a_checkpoint_may_not_name_the_hub_or_code(quick_run, tmp_path):
    content = torch.load(quick_run / "best.ckpt", weights_only=True)
    network = {"class_path": "visionattn.models.Classifier", "init_args": {"backbone": "hf:a/b", "num_classes": 2}}
    content["visionattn"]["model"]["init_args"]["network"] = network
    plain = {"model_type": "vit", "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    for fields, message in (
        (None, "names the model 'hf:a/b' without its architecture"),
        ({**plain, "attn_implementation": "owner/kernel"}, "gives the option attn_implementation = 'owner/kernel'"),
        ({**plain, "auto_map": {"AutoConfig": "mine.Config"}}, "gives the option AutoConfig = 'mine.Config'"),
        ({"model_type": "timm_wrapper"}, "is a model of timm"),
        ({"model_type": "bert"}, "is of type bert; transformers has no image classifier of this type"),
        (plain, "do not fit the model in the same file"),
    ):
        content["visionattn"]["architectures"] = {} if fields is None else {"hf:a/b": fields}
        torch.save(content, tmp_path / "c.ckpt")
        refuses((DataError, UsageError), message, load, tmp_path / "c.ckpt")
