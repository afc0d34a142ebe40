"""Files from untrusted sources: no code is run, nothing is written outside of the output folder, nothing crashes."""

import io
import json
import os
import pickle
import random
import resource
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, features

from visionattn.data import read_image
from visionattn.errors import DataError
from visionattn.training import load

LIGHTNING = ("fit", "validate", "test", "predict")
OWN = ("overlay", "explore", "score", "export")  # a verb that takes --ckpt belongs here


class Runs:
    """Unpickled, it would call `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_checkpoints(folder, content):
    """Write them; each that could run would make the file `ran`."""
    ran = str(folder / "ran")
    (folder / "evil_module.py").write_text(f"open({ran!r}, 'w')\nclass Net: pass\n")
    code = f"open({ran!r}, 'w').write('x')"
    calls = {
        "system": Runs(os.system, f"touch {ran}"), "open": Runs(open, ran, "w"), "exec": Runs(exec, code),
        "eval": Runs(eval, code), "import": Runs(__import__, "evil_module"),
        "compile": Runs(compile, code, "x", "exec"), "load": Runs(torch.load, ran),
        "hub": Runs(torch.hub.load, "a/b", "c"), "numpy": Runs(np.load, ran),
    }  # fmt: skip
    made = {}

    def save(name, thing, **options):
        made[name] = folder / f"{name}.ckpt"
        torch.save(thing, made[name], **options)

    for name, call in calls.items():
        save(f"{name}_in_state", {**content, "state_dict": {**content["state_dict"], "x": call}})
        save(f"{name}_in_entry", {**content, "visionattn": call})
    save("old_format", {**content, "x": calls["open"]}, _use_new_zipfile_serialization=False)
    save("old_format_of_plain_data", content, _use_new_zipfile_serialization=False)
    made["pickle"] = folder / "pickle.ckpt"
    made["pickle"].write_bytes(pickle.dumps(calls["open"]))

    def described(name, network, **more):
        model = json.loads(json.dumps(content["visionattn"]["model"]))
        model["init_args"]["network"] = network
        save(name, {**content, "visionattn": {**content["visionattn"], "model": model}, **more})

    for path in (
        "evil_module.Net", "os.system", "builtins.exec", "subprocess.Popen", "torch.hub.load", "visionattn.cli.sys",
        "torch.utils.collect_env.run", "torchvision.datasets.utils.download_url", "timm.create_model", "torch.nn.os",
    ):  # fmt: skip
        described(f"names_{path}", {"class_path": path, "init_args": {}})
    hyper = {"_class_path": "evil_module.Net", "_instantiator": "evil_module.Net", "lr": 1}
    save("hyper_parameters", {**content, "hyper_parameters": hyper})
    save("task_of_a_stranger", {**content, "visionattn": {"model": {"class_path": "evil_module.Net"}}})

    whole = io.BytesIO()
    torch.save(content, whole)
    for part in (0, 1, 100, len(whole.getvalue()) // 2, len(whole.getvalue()) - 100, len(whole.getvalue()) - 1):
        made[f"cut_{part}"] = folder / f"cut_{part}.ckpt"
        made[f"cut_{part}"].write_bytes(whole.getvalue()[:part])
    made["bomb"] = folder / "bomb.ckpt"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(made["bomb"], "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
        target.writestr("archive/data/999", b"\0" * (1 << 28))
    return made


@pytest.fixture(scope="module")
def hostile(quick_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    return hostile_checkpoints(folder, torch.load(quick_run / "best.ckpt", weights_only=True)), folder


def test_nothing_in_a_checkpoint_runs(hostile, quick_run, monkeypatch):
    files, folder = hostile
    assert len(files) == 40
    monkeypatch.syspath_prepend(folder)
    load(quick_run / "best.ckpt")  # what loading itself imports is there before
    before = set(sys.modules)
    for name, path in files.items():
        if name == "hyper_parameters":
            load(path)  # ours are not among them, and nobody looks at them
            continue
        with pytest.raises(DataError) as told:
            load(path)
        assert str(path) in str(told.value)
        assert len(str(told.value)) < 600
    assert set(sys.modules) - before <= {"encodings.cp437"}  # the alphabet of old zip archives, of the standard library
    assert not (folder / "ran").exists()


def commands(verb, path, quick_run, folder):
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
@pytest.mark.parametrize("some", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_no_verb_runs_code_of_a_checkpoint(verb, some, hostile, quick_run, server, tmp_path):
    files, folder = hostile
    Image.new("RGB", (8, 8)).save(folder / "image.png")
    names = ["open_in_state", "names_evil_module.Net", "bomb"] if some < len(files) else list(files)
    calls = {name: commands(verb, files[name], quick_run, folder) for name in names}
    if verb in OWN:
        calls.pop("hyper_parameters", None)  # they do not look at them, as `load`
    if verb == "export":  # it builds nothing from what it copies
        calls = {name: call for name, call in calls.items() if not name.startswith(("names_", "task_of"))}
    fault = f"run_all({list(calls.values())!r}, {str(folder)!r})"
    ended = server.run([], tmp_path, fault=fault)
    told = json.loads(ended.output.splitlines()[-1])
    assert [code for code, _, _ in told] == [1] * len(calls) or verb in LIGHTNING
    assert all(code in (1, 2) for code, _, _ in told)  # 2: the model differs from that of the config
    assert all(".ckpt" in message for _, message, _ in told)
    assert [modules for _, _, modules in told if modules] == []
    assert not (folder / "ran").exists()


def kinds():
    """Name → bytes of pictures in every format, mode and oddity that Pillow writes, and of files that are none."""
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 255, (24, 32, 3), dtype=np.uint8))
    made = {}
    exif = b"Exif\0\0II*\0"
    turned = exif + b"\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"

    def add(name, image, **options):
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.save(buffer, **options)
        made[name] = buffer.getvalue()

    modes = {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
        "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16"),
        "BMP": ("1", "L", "P", "RGB", "RGBA"), "GIF": ("L", "P", "RGB"), "WEBP": ("RGB", "RGBA"),
        "PPM": ("1", "L", "RGB"), "TGA": ("L", "RGB", "RGBA"), "ICO": ("RGBA",), "PCX": ("L", "P", "RGB"),
        "SGI": ("L", "RGB"), "IM": ("L", "RGB"),
    }  # fmt: skip
    for kind, some in modes.items():
        for mode in some:
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
    add("moving_png", picture, format="PNG", save_all=True, append_images=[picture.rotate(90)])
    add("turned", picture, format="JPEG", exif=turned)
    add("bad_exif", picture, format="JPEG", exif=exif + b"\xff\xff\xff\xff")
    add("one_pixel", picture.crop((0, 0, 1, 1)), format="PNG")
    add("a_line", picture.resize((5000, 1)), format="PNG")
    add("bomb", Image.new("1", (30_000, 30_000)), format="PNG")
    made |= {"nothing": b"", "text": b"hello", "zeros": bytes(1000), "zip": b"PK\x03\x04" + bytes(100)}
    made |= {"svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n"}
    return made


def read_or_reason(content, path):
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


def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB


def test_every_kind_of_image_is_read_or_refused_with_a_reason(tmp_path):
    made = kinds()
    assert len(made) >= 60
    before = memory()
    reasons = {name: read_or_reason(content, tmp_path / f"{name}.x") for name, content in made.items()}
    assert memory() - before < 1
    assert not [reason for reason in reasons.values() if reason and "does not name" in reason]
    refused = {name for name, reason in reasons.items() if reason}
    assert {"nothing", "text", "zeros", "zip", "svg", "postscript", "bomb"} <= refused
    assert len(refused) <= 8, reasons


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_mutation_of_an_image_crashes_the_decoder(count, tmp_path):
    made = {name: content for name, content in kinds().items() if content and name != "bomb"}
    names, before = sorted(made), memory()
    for seed in range(count):
        draw = random.Random(seed)
        content = bytearray(made[names[seed % len(names)]])
        match seed % 4:
            case 0:  # bytes changed
                for _ in range(draw.randint(1, 8)):
                    content[draw.randrange(len(content))] = draw.randrange(256)
            case 1:  # the header changed
                content[draw.randrange(min(64, len(content)))] ^= 1 << draw.randrange(8)
            case 2:  # cut
                del content[draw.randrange(len(content)) :]
            case _:  # a piece repeated
                place = draw.randrange(len(content))
                content[place:place] = content[place // 2 : place]
        assert "does not name" not in (read_or_reason(bytes(content), tmp_path / "x") or "")
    assert memory() - before < 1


def test_image_names_cannot_lead_out_of_the_output_folder(server, tmp_path):
    """Every image once in the manifest; nothing outside the output folder; nothing of others overwritten."""
    home, outside = tmp_path / "home", tmp_path / "outside"
    images = home / "in"
    images.mkdir(parents=True)
    outside.mkdir()
    (outside / "mine.png").write_bytes(b"mine")
    content = kinds()["PNG_RGB"]
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
    assert ended.code == 1, ended.output  # one is no image
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
