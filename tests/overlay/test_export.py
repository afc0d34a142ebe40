"""Whole runs: awkward images, second runs, killed runs, full disks, and the truth of the manifest."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import nn

from tests.overlay.test_manifest import disk_full_after
from tests.overlay.test_video import film
from visionattn.data.placement import Preprocess
from visionattn.errors import DataError, UsageError
from visionattn.maps.base import Maps
from visionattn.maps.cam import GradCAM
from visionattn.overlay import job
from visionattn.overlay.export import _fitting, export
from visionattn.overlay.recipe import describe, weights_hash
from visionattn.overlay.render import Style, peak, render
from visionattn.overlay.video import Frames
from visionattn.overlay.views import View

CLASSES = ("cat", "dog", "owl")
NOT_TEXT = os.fsdecode(b"caf\xe9.jpg")


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x_BCHW):
        return self.head(4 * F.relu(self.conv(x_BCHW)).mean((2, 3)))


def bright(model, images_BCHW, *, target=None, contrast=1):
    """A method whose heatmap is known: how bright each cell of the input is."""
    cells_Bhw = F.avg_pool2d(images_BCHW, 2).mean(1).mul(contrast)
    low, high = cells_Bhw.amin((1, 2), keepdim=True), cells_Bhw.amax((1, 2), keepdim=True)
    heatmaps_Bhw = (cells_Bhw - low) / (high - low).clamp(min=1e-6)
    return Maps(heatmaps_Bhw, cells_Bhw, model(images_BCHW).detach(), None, "the input", "bright")


VIEW = {"model", "preprocess", "method", "class_names", "model_name"}


def run(inputs, out, **options):
    view = {"model": Tiny(), "preprocess": Preprocess(16), "method": bright}
    view |= {name: options.pop(name) for name in VIEW & options.keys()}
    options = {"views": View(**view), "batch_size": 3, "workers": 2, "console": Console(quiet=True), **options}
    return export(inputs, out, **options)


def noise(height=20, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def photos(folder, count=7):
    for number in range(count):
        save(folder / f"{number}.png", noise(20 + number, 30, number))
    return folder


def manifest(out):
    entries = [json.loads(line) for line in (out / "manifest.jsonl").read_bytes().splitlines()]
    assert len({entry["source"] for entry in entries}) == len(entries)  # each image once
    return {os.path.basename(entry["source"]): entry for entry in entries}


def overlays(out):
    return {str(path.relative_to(out)) for path in out.rglob("*") if ".overlay." in path.name}


def snapshot(out):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}


def redone(out, before):
    """Names of the overlays that are not the same files as before."""
    after = snapshot(out)
    return {path.name.split(".")[0] for path in after if ".overlay." in path.name and after[path] != before.get(path)}


def awkward(folder):
    """Images that are hard to read, as (H, W, 3) where Pillow or arithmetic says what they show, or why they fail."""
    folder.mkdir()
    plain = noise()
    save(folder / "plain.png", plain)
    save(folder / "grey.png", plain[..., 0])
    Image.fromarray(plain).convert("CMYK").save(folder / "cmyk.jpg")
    deep = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    save(folder / "deep.png", deep)
    palette = Image.fromarray(plain).quantize(16)
    palette.info["transparency"] = 3
    palette.save(folder / "palette.png", transparency=3)
    rgb, indices = np.array(palette.convert("RGB")), np.array(palette)
    rgb[indices == 3] = 255  # seen through, over white
    half = np.dstack([plain, np.full((20, 30), 128, np.uint8)])
    save(folder / "half.png", half)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter to the right
    Image.fromarray(np.rot90(plain)).save(folder / "turned.png", exif=exif)
    frames = [Image.fromarray(noise(seed=seed)).quantize(32) for seed in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:], duration=50)

    save(folder / "cut.jpg", noise(200, 200))
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:9000])
    (folder / "empty.jpg").touch()
    (folder / "corrupt.jpg").write_bytes(np.random.default_rng(5).bytes(3000))
    save(folder / "header.png", plain)
    (folder / "header.png").write_bytes((folder / "header.png").read_bytes()[:40])
    save(folder / "huge.png", noise(200, 201))
    (folder / "gone.jpg").symlink_to(folder / "nowhere")
    return {
        "plain.png": plain,
        "grey.png": np.repeat(plain[..., :1], 3, 2),
        "cmyk.jpg": np.array(Image.open(folder / "cmyk.jpg").convert("RGB")),
        "deep.png": np.repeat(np.rint(deep / 257).astype(np.uint8)[..., None], 3, 2),
        "palette.png": rgb,
        "half.png": np.rint(plain * (128 / 255) + 255 * (127 / 255)).astype(np.uint8),
        "turned.png": plain,
        "moving.gif": np.array(frames[0].convert("RGB")),
        "cut.jpg": "cut short",
        "empty.jpg": "is empty",
        "corrupt.jpg": "is no image",
        "header.png": "damaged|cut short|is no image",
        "huge.png": r"200 × 201|201 × 200",
        "gone.jpg": "there is no",
    }


def test_awkward_images_become_overlays_or_failures_with_their_reason(tmp_path):
    known = awkward(tmp_path / "in")
    summary = run([tmp_path / "in"], tmp_path / "out", style=Style(suffix=".png"), max_pixels=40_000)
    entries = manifest(tmp_path / "out")
    assert set(entries) == set(known)
    good = {name for name, content in known.items() if isinstance(content, np.ndarray)}
    assert overlays(tmp_path / "out") == {f"{name}.overlay.png" for name in good}
    assert (summary.written, summary.failed, summary.exit_code) == (len(good), len(known) - len(good), 1)
    for name, content in known.items():
        entry = entries[name]
        if isinstance(content, str):
            assert entry["status"] == "failed"
            assert re.search(content, entry["reason"])
            assert str(tmp_path) not in entry["reason"]  # it stands in `source`
            assert "\n" not in entry["reason"]
            continue
        assert entry["status"] == "done"
        assert (entry["height"], entry["width"]) == content.shape[:2]
        drawn = np.array(Image.open(tmp_path / "out" / entry["outputs"]["overlay"]))
        tensor, placement = Preprocess(16)(content)
        heatmap = bright(Tiny(), torch.from_numpy(tensor)[None]).heatmaps[0].numpy()
        difference = np.abs(drawn.astype(int) - render(content, heatmap, placement, Style()))
        assert difference.max() <= 8, name  # what Pillow rounds otherwise, and one level of heat


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (41, 77), (77, 41)])
@pytest.mark.parametrize("fit", ["crop", "letterbox", "stretch"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_overlay_and_peak_point_at_the_object_in_the_source(tmp_path, size, fit, orientation):
    upright = np.full((*size, 3), 20, np.uint8)
    top, left = size[0] // 2 + 4, size[1] // 2 - 12
    upright[top : top + 8, left : left + 8] = 255
    turns = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]  # quarters to the left, that undo what the camera noted
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "x.png", np.rot90(upright, turns), exif=exif)
    run([path], tmp_path / "out", preprocess=Preprocess(32, fit=fit), style=Style(suffix=".png", saturation=0, alpha=1))
    entry = manifest(tmp_path / "out")["x.png"]
    x, y = entry["peak"]
    assert left - 2 <= x <= left + 10
    assert top - 2 <= y <= top + 10
    drawn = np.array(Image.open(tmp_path / "out" / "x.png.overlay.png")).astype(int)
    assert drawn.shape == upright.shape
    yellow = (drawn[..., 0] > 200) & (drawn[..., 1] > 200) & (drawn[..., 2] > 80)  # the hottest of inferno
    ys, xs = np.nonzero(yellow)
    assert len(ys)
    assert abs(ys.mean() + 0.5 - (top + 4)) < 3
    assert abs(xs.mean() + 0.5 - (left + 4)) < 3


def test_a_line_holds_what_the_manifest_promises(tmp_path):
    photos(tmp_path / "in", 2)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no")
    run([tmp_path / "in"], tmp_path / "out", method=GradCAM(), class_names=CLASSES, model_name="tiny")
    entries = manifest(tmp_path / "out")
    about = {"source", "bytes", "modified", "recipe", "status"}
    told = {"outputs", "width", "height", "model", "method", "layer", "target", "prediction", "class", "probability"}
    assert set(entries["0.png"]) == about | told | {"peak", "seconds"}
    assert set(entries["bad.jpg"]) == about | {"reason"}
    assert len({entry["recipe"] for entry in entries.values()}) == 1
    for name, entry in entries.items():
        state = (tmp_path / "in" / name).stat()
        assert entry["source"] == str(tmp_path / "in" / name)
        assert (entry["bytes"], entry["modified"]) == (state.st_size, state.st_mtime_ns)
    one = entries["1.png"]
    assert one["outputs"] == {"overlay": "1.png.overlay.jpg"}
    assert (one["width"], one["height"]) == (30, 21)
    assert (one["model"], one["method"]) == ("tiny", "gradcam")
    assert "conv" in one["layer"]
    assert one["target"] == one["prediction"]
    assert 0 <= one["peak"][0] <= 30
    assert 0 <= one["peak"][1] <= 21
    assert 0 < one["seconds"] < 10


@pytest.mark.parametrize("method", [bright, GradCAM()])
def test_prediction_and_probability_are_those_of_a_plain_forward(tmp_path, method):
    photos(tmp_path / "in")
    run([tmp_path / "in"], tmp_path / "out", method=method, class_names=CLASSES, target=1)
    model = Tiny().eval()
    for name, entry in manifest(tmp_path / "out").items():
        tensor, _ = Preprocess(16)(np.array(Image.open(tmp_path / "in" / name)))
        probabilities = model(torch.from_numpy(tensor)[None])[0].softmax(0).detach()
        assert entry["prediction"] == int(probabilities.argmax())
        assert entry["class"] == CLASSES[entry["prediction"]]
        assert entry["probability"] == pytest.approx(float(probabilities.max()), abs=2e-6)
        assert entry["target"] == (1 if method is not bright else None)


def test_a_timm_transformer_takes_its_own_method(tmp_path):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    photos(tmp_path / "in", 2)
    run([tmp_path / "in"], tmp_path / "out", model=model, preprocess=Preprocess(32), method=None)
    entry = manifest(tmp_path / "out")["0.png"]
    tensor, _ = Preprocess(32)(noise(20, 30, 0))
    probabilities = model.eval()(torch.from_numpy(tensor)[None])[0].softmax(0).detach()
    assert (entry["prediction"], entry["method"]) == (int(probabilities.argmax()), "raw")
    assert entry["probability"] == pytest.approx(float(probabilities.max()), abs=2e-6)


def test_outputs_do_not_depend_on_batches_threads_or_memory(tmp_path, monkeypatch):
    photos(tmp_path / "in")
    (tmp_path / "in" / "3.png").write_bytes(b"")
    made = []
    for name, options in {
        "a": {"batch_size": 1, "workers": 1},
        "b": {"batch_size": 100, "workers": 4},
        "c": {},
    }.items():
        if name == "c":
            monkeypatch.setattr(job, "_KEPT_BYTES", 0)  # every picture is read a second time
        run([tmp_path / "in"], tmp_path / name, **options)
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.overlay.jpg")})
    assert len(made[0]) == 6
    assert made[0] == made[1] == made[2]


def test_a_second_run_changes_nothing(tmp_path):
    awkward(tmp_path / "in")
    first = run([tmp_path / "in"], tmp_path / "out", max_pixels=40_000)
    before, folder = snapshot(tmp_path / "out"), (tmp_path / "out").stat().st_mtime_ns
    second = run([tmp_path / "in"], tmp_path / "out", max_pixels=40_000)
    assert snapshot(tmp_path / "out") == before
    assert (tmp_path / "out").stat().st_mtime_ns == folder
    assert (second.written, second.skipped, second.failed) == (0, first.written, first.failed)
    assert second.exit_code == 1


def test_what_changed_or_is_missing_is_made_again_and_the_rest_is_left(tmp_path):
    photos(tmp_path / "in")
    run([tmp_path / "in"], tmp_path / "out")
    before = snapshot(tmp_path / "out")
    save(tmp_path / "in" / "2.png", noise(seed=99))
    os.utime(tmp_path / "in" / "4.png", ns=(1, 1))
    (tmp_path / "out" / "5.png.overlay.jpg").unlink()
    save(tmp_path / "in" / "7.png", noise(seed=7))
    (tmp_path / "in" / "6.png").write_bytes(b"")
    summary = run([tmp_path / "in"], tmp_path / "out")
    assert (summary.written, summary.skipped, summary.failed) == (4, 3, 1)
    changed = {path.name for path, content in snapshot(tmp_path / "out").items() if before.get(path) != content}
    assert changed == {"manifest.jsonl"} | {f"{number}.png.overlay.jpg" for number in (2, 4, 5, 7)}
    entries = manifest(tmp_path / "out")
    assert entries["4.png"]["modified"] == 1
    assert entries["6.png"]["earlier"] == ["6.png.overlay.jpg"]


def other_weights():
    model = Tiny()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] += 1e-6
    return model


@pytest.mark.parametrize(
    "change",
    [
        {"style": Style(alpha=0.7)},
        {"target": 1},
        {"preprocess": Preprocess(16, fit="stretch")},
        {"model": other_weights()},
        {"method": partial(bright, contrast=3)},
        {"class_names": CLASSES},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_recipe_makes_all_again_and_the_first_one_again(tmp_path, change):
    photos(tmp_path / "in", 4)
    method = {"method": partial(bright, contrast=2)}
    run([tmp_path / "in"], tmp_path / "out", **method)
    assert run([tmp_path / "in"], tmp_path / "out", **{**method, **change}).written == 4
    assert run([tmp_path / "in"], tmp_path / "out", **{**method, **change}).skipped == 4
    assert run([tmp_path / "in"], tmp_path / "out", **method).written == 4
    assert len(manifest(tmp_path / "out")) == 4


def test_what_does_not_change_the_outputs_does_not_make_them_again(tmp_path):
    photos(tmp_path / "in", 4)
    run([tmp_path / "in"], tmp_path / "out")
    same = {"batch_size": 1, "workers": 1, "max_pixels": 10_000, "model": Tiny().eval()}
    assert run([tmp_path / "in"], tmp_path / "out", **same).skipped == 4


def test_another_format_stands_beside_the_earlier_one(tmp_path):
    photos(tmp_path / "in", 2)
    run([tmp_path / "in"], tmp_path / "out")
    run([tmp_path / "in"], tmp_path / "out", style=Style(suffix=".webp"))
    assert overlays(tmp_path / "out") == {f"{n}.png.overlay.{kind}" for n in range(2) for kind in ("jpg", "webp")}
    assert manifest(tmp_path / "out")["0.png"]["earlier"] == ["0.png.overlay.jpg"]


def test_choices_that_differ_are_described_differently_and_in_every_process_alike():
    values = [
        np.zeros(2), np.ones(2), np.float32(0.5), np.float32(0.25), Path("a"), Path("b"), partial(bright, contrast=1),
        partial(bright, contrast=2), bright, GradCAM(), GradCAM(layer="conv"), torch.zeros(2), Tiny(), other_weights(),
        {"a": 1}, {"a": 2}, [1, 2], None, True, "a", Style(), Style(alpha=0.5), Preprocess(8), Preprocess(9), {1}, {2},
    ]  # fmt: skip
    described = [json.dumps(describe(value)) for value in values]
    assert len(set(described)) == len(values)
    assert not [text for text in described if "0x" in text]  # an address would differ next time


def test_weights_of_every_kind_are_hashed():
    class Buffers(nn.Module):
        def __init__(self, *tensors):
            super().__init__()
            for number, tensor in enumerate(tensors):
                self.register_buffer(f"b{number}", tensor)

    kinds = [torch.zeros(0), torch.tensor(3), torch.tensor([True]), torch.ones(2).bfloat16(), torch.ones(3, 2).T]
    hashes = [weights_hash(Buffers(kind)) for kind in kinds]
    assert len(set(hashes)) == len(kinds)
    assert weights_hash(Buffers(torch.ones(3, 2).T.contiguous())) == hashes[-1]


KILLED = """
import os, signal, sys
from pathlib import Path
import tests.overlay.test_export as t

def die(): os.kill(os.getpid(), signal.SIGKILL)

def after(count, act):
    calls = []
    def counted(*args, **kwargs):
        calls.append(1)
        return act(*args, **kwargs) if len(calls) > count else None
    return counted

def in_the_method(folder):
    dying = after(3, lambda: die())
    def method(*args, **kwargs):
        dying()
        return t.bright(*args, **kwargs)
    method.__qualname__, method.__module__ = t.bright.__qualname__, t.bright.__module__
    return {"method": method}

def written_but_not_noted(folder):
    replace, dying = os.replace, after(3, lambda: die())
    def replacing(source, target):
        replace(source, target)
        dying()
    os.replace = replacing
    return {}

def half_written(folder):
    dying = after(3, lambda handle: (os.ftruncate(handle, 100), die()))
    os.fsync = lambda handle: ".part" in os.readlink(f"/proc/self/fd/{handle}") and dying(handle)
    return {}

for name in sys.argv[2:]:  # forked, so that torch is imported once
    child = os.fork()
    if child == 0:
        folder, (way, alpha) = Path(sys.argv[1]), name.split(",")
        t.run([folder / "in"], folder / name, style=t.Style(alpha=float(alpha)), **globals()[way](folder))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, name
"""
WAYS = ["in_the_method", "written_but_not_noted", "half_written"]


def contents(out):
    return {name: (out / name).read_bytes() for name in overlays(out)}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Output folders whose run was killed, named way,alpha; before it, another run had done some of the images."""
    root = tmp_path_factory.mktemp("killed")
    photos(root / "in", 11)
    run([root / "in"], root / "whole")
    ways = {f"{way},0.75": Style(alpha=0.1) for way in WAYS[1:]} | {f"{way},0.1": Style() for way in WAYS[1:]}
    for out, style in ways.items():
        run([root / "in" / f"{number}.png" for number in range(6)], root / out, style=style)
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(root), "in_the_method,0.75", *ways],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return root


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_is_continued_and_nothing_is_lost_or_made_twice(killed, way):
    out = killed / f"{way},0.75"
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_bytes().splitlines()]
    recipe = manifest(killed / "whole")["0.png"]["recipe"]
    kept = {entry["outputs"]["overlay"] for entry in lines if entry["recipe"] == recipe}
    assert len(kept) < 11
    assert kept or way != "in_the_method"
    before = snapshot(out)
    summary = run([killed / "in"], out)
    assert (summary.skipped, summary.written, summary.failed) == (len(kept), 11 - len(kept), 0)
    assert all(snapshot(out)[out / name] == before[out / name] for name in kept)
    assert contents(out) == contents(killed / "whole")
    assert len(manifest(out)) == 11
    assert not (out / ".manifest.promised").exists()


@pytest.mark.parametrize("way", WAYS[1:])
def test_what_a_killed_run_replaced_is_not_taken_for_what_stood_there_before(killed, way):
    out = killed / f"{way},0.1"
    whole = contents(killed / "whole")
    assert way == "half_written" or any(content != whole[name] for name, content in contents(out).items())
    run([killed / "in"], out)
    assert contents(out) == whole


def test_ctrl_c_keeps_what_was_made(tmp_path):
    photos(tmp_path / "in", 20)
    calls = []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return bright(*args, **kwargs)

    stopped.__qualname__, stopped.__module__ = bright.__qualname__, bright.__module__
    with pytest.raises(KeyboardInterrupt):
        run([tmp_path / "in"], tmp_path / "out", method=stopped)
    made = overlays(tmp_path / "out")
    assert {entry["outputs"]["overlay"] for entry in manifest(tmp_path / "out").values()} == made
    assert run([tmp_path / "in"], tmp_path / "out").skipped == len(made) > 0
    assert len(overlays(tmp_path / "out")) == 20


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_the_file_of_a_stranger_is_never_overwritten(tmp_path, kind):
    photos(tmp_path / "in", 3)
    theirs = tmp_path / "out" / "1.png.overlay.jpg"
    theirs.parent.mkdir()
    (tmp_path / "precious").write_bytes(b"mine")
    {
        "file": lambda: theirs.write_bytes(b"mine"),
        "folder": theirs.mkdir,
        "link": lambda: theirs.symlink_to(tmp_path / "precious"),
    }[kind]()
    with pytest.raises(UsageError, match=r"1\.png\.overlay\.jpg exists, and .* choose another folder") as caught:
        run([tmp_path / "in"], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "out") == ["1.png.overlay.jpg"]
    assert kind == "folder" or theirs.read_bytes() == b"mine"


def test_nothing_is_written_through_a_link_that_leads_elsewhere(tmp_path):
    photos(tmp_path / "in" / "a" / "b", 1)
    photos(tmp_path / "in", 1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to(tmp_path / "elsewhere")
    summary = run([tmp_path / "in"], tmp_path / "out")
    assert (summary.written, summary.failed) == (1, 1)
    assert "is a link that leads out of" in summary.failures[0][1]
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_file_in_the_place_of_a_folder_fails_its_images_alone(tmp_path):
    photos(tmp_path / "in" / "a", 2)
    photos(tmp_path / "in", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_bytes(b"mine")
    summary = run([tmp_path / "in"], tmp_path / "out")
    assert (summary.written, summary.failed) == (1, 2)
    assert (tmp_path / "out" / "a").read_bytes() == b"mine"


def test_no_half_of_an_overlay_stands_under_its_name_when_encoding_fails(tmp_path, monkeypatch):
    photos(tmp_path / "in", 4)

    def half(self, file, *args, **options):
        (file.write if hasattr(file, "write") else Path(file).write_bytes)(b"\xff\xd8 half")
        raise OSError("encoder error -2")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", half)
        summary = run([tmp_path / "in"], tmp_path / "out", style=Style(suffix=".png"))
    assert (summary.written, summary.failed) == (0, 4)
    assert "encoder error -2" in manifest(tmp_path / "out")["0.png"]["reason"]
    assert os.listdir(tmp_path / "out") == ["manifest.jsonl"]
    assert run([tmp_path / "in"], tmp_path / "out").written == 4


def test_an_overlay_that_does_not_fit_the_disk_fails_and_the_others_are_written(tmp_path):
    photos(tmp_path / "in", 3)
    save(tmp_path / "in" / "large.png", noise(300, 300))
    with disk_full_after(8192):
        summary = run([tmp_path / "in"], tmp_path / "out", style=Style(suffix=".png"))
    assert (summary.written, summary.failed) == (3, 1)
    assert manifest(tmp_path / "out")["large.png"]["reason"].endswith("cannot be written: File too large")
    assert sorted(os.listdir(tmp_path / "out")) == [*(f"{n}.png.overlay.png" for n in range(3)), "manifest.jsonl"]
    assert run([tmp_path / "in"], tmp_path / "out", style=Style(suffix=".png")).written == 1


def test_a_disk_too_full_for_the_manifest_ends_the_run_and_the_next_one_goes_on(tmp_path):
    photos(tmp_path / "in", 12)
    with disk_full_after(3000), pytest.raises(DataError, match="cannot be written: File too large; nothing more"):
        run([tmp_path / "in"], tmp_path / "out")
    noted = len(manifest(tmp_path / "out"))
    assert 0 < noted < 12
    summary = run([tmp_path / "in"], tmp_path / "out")
    assert (summary.skipped, summary.written) == (noted, 12 - noted)
    assert len(manifest(tmp_path / "out")) == len(overlays(tmp_path / "out")) == 12
    assert len(os.listdir(tmp_path / "out")) == 13  # nothing is left behind


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nowhere/out"])
def test_a_folder_that_cannot_be_made_is_one_clear_sentence(tmp_path, out):
    photos(tmp_path / "in", 1)
    (tmp_path / "file").touch()
    with pytest.raises((UsageError, DataError), match=r"is a file; name|Not a directory|No such file") as caught:
        run([tmp_path / "in"], tmp_path / out)
    assert "\n" not in str(caught.value)


def test_odd_names_are_exported_like_others(tmp_path):
    names = [NOT_TEXT, "a" * 251 + ".png", "new\nline.png", "[red]x.png", "ảnh 犬.png", "x.PNG", "x.png"]
    for name in names:
        save(tmp_path / "in" / "plain.png", noise())
        (tmp_path / "in" / "plain.png").rename(tmp_path / "in" / name)
    (tmp_path / "in" / "[bold]empty.jpg").touch()
    text = io.StringIO()
    summary = run([tmp_path / "in"], tmp_path / "out", console=Console(file=text, width=300))
    assert (summary.written, summary.failed) == (len(names), 1)
    assert "[bold]empty.jpg: is empty" in text.getvalue()
    entries = manifest(tmp_path / "out")
    assert {*names, "[bold]empty.jpg"} == set(entries)
    assert {entries[name]["outputs"]["overlay"] for name in names} == overlays(tmp_path / "out")
    assert run([tmp_path / "in"], tmp_path / "out").skipped == len(names)


@pytest.mark.parametrize("out", ["in", "in/seen", "link"])
def test_outputs_among_the_inputs_are_not_read_again(tmp_path, out):
    photos(tmp_path / "in", 3)
    photos(tmp_path / "in" / "more", 2)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert run([tmp_path / "in"], tmp_path / out).written == 5
    assert run([tmp_path / "in"], tmp_path / out).skipped == 5
    assert run([tmp_path / "in"], tmp_path / out, target=1).written == 5
    assert len(overlays(tmp_path / out)) == 5


def test_all_failures_are_a_finished_run(tmp_path):
    for number in range(9):
        save(tmp_path / "in" / f"{number}.png", noise()).write_bytes(b"")
    summary = run([tmp_path / "in"], tmp_path / "out")
    assert (summary.written, summary.failed, summary.exit_code) == (0, 9, 1)
    assert os.listdir(tmp_path / "out") == ["manifest.jsonl"]


def test_a_folder_that_cannot_be_listed_fails_and_the_others_are_exported(tmp_path, monkeypatch):
    photos(tmp_path / "in", 2)
    photos(tmp_path / "in" / "locked", 2)
    scandir = os.scandir

    def refusing(path="."):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    summary = run([tmp_path / "in"], tmp_path / "out")
    assert (summary.written, summary.failed, summary.exit_code) == (2, 1, 1)
    assert summary.failures == [("locked", "cannot be listed: Permission denied")]


def test_an_image_that_the_method_cannot_explain_fails_alone(tmp_path):
    photos(tmp_path / "in", 7)
    save(tmp_path / "in" / "3.png", np.full((20, 20, 3), 255, np.uint8))

    def picky(model, images_BCHW, *, target=None):
        if (images_BCHW.std((1, 2, 3)) < 0.5).any():
            raise DataError("the images hold NaN or infinity")
        return bright(model, images_BCHW)

    summary = run([tmp_path / "in"], tmp_path / "out", method=picky)
    assert (summary.written, summary.failed) == (6, 1)
    assert manifest(tmp_path / "out")["3.png"]["reason"] == "the images hold NaN or infinity"


def test_a_model_that_is_not_finite_ends_the_run_with_its_reason(tmp_path):
    photos(tmp_path / "in", 4)
    model = Tiny()
    model.conv.weight.data[0] = float("nan")
    with pytest.raises(DataError, match=r"conv\.weight holds NaN"):
        run([tmp_path / "in"], tmp_path / "out", model=model, method=GradCAM())
    assert not overlays(tmp_path / "out")


def test_a_blank_heatmap_is_written_and_told(tmp_path):
    save(tmp_path / "in" / "grey.png", np.full((20, 30, 3), 90, np.uint8))
    summary = run([tmp_path / "in"], tmp_path / "out")
    assert (summary.written, summary.blank) == (1, 1)
    assert manifest(tmp_path / "out")["grey.png"]["peak"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "must be ≥ 1, got 0"),
        ({"max_pixels": 0}, "must be ≥ 1"),
        ({"workers": 0}, "must be ≥ 1"),
        ({"class_names": ("cat", "dog")}, "2 class names, and the model has 3 outputs"),
        ({"method": GradCAM(), "target": 3}, "out of range: the model has 3 outputs"),
        ({"method": GradCAM(layer="cnov")}, "cnov"),
    ],
)
def test_wrong_calls_are_refused_and_write_no_overlay(tmp_path, options, words):
    photos(tmp_path / "in", 2)
    with pytest.raises(UsageError, match=words):
        run([tmp_path / "in"], tmp_path / "out", **options)
    assert not overlays(tmp_path / "out")


def test_every_kind_stands_beside_the_others_and_is_made_once(tmp_path):
    photos(tmp_path / "in", 3)
    first = run([tmp_path / "in"], tmp_path / "out")
    before = snapshot(tmp_path / "out")
    more = run([tmp_path / "in"], tmp_path / "out", save=("heatmap", "mask", "array"))
    assert (first.written, more.written) == (3, 3)
    entry = manifest(tmp_path / "out")["1.png"]
    assert entry["outputs"] == {
        "overlay": "1.png.overlay.jpg",
        "heatmap": "1.png.heatmap.png",
        "mask": "1.png.mask.png",
        "array": "1.png.array.npz",
    }
    assert "earlier" not in entry
    after = snapshot(tmp_path / "out")
    assert all(after[path] == before[path] for path in before if path.suffix == ".jpg")
    every = run([tmp_path / "in"], tmp_path / "out", save=("overlay", "heatmap", "mask", "array"))
    assert (every.written, every.skipped) == (0, 3)
    assert snapshot(tmp_path / "out") == after
    (tmp_path / "out" / "2.png.mask.png").unlink()
    assert run([tmp_path / "in"], tmp_path / "out", save=("overlay", "mask")).written == 1
    assert set(manifest(tmp_path / "out")["2.png"]["outputs"]) == {"overlay", "heatmap", "mask", "array"}
    run([tmp_path / "in"], tmp_path / "out", save=("mask",), style=Style(top=0.4))  # another recipe: its own outputs
    entry = manifest(tmp_path / "out")["1.png"]
    assert entry["outputs"] == {"mask": "1.png.mask.png"}
    assert set(entry["earlier"]) == {"1.png.overlay.jpg", "1.png.heatmap.png", "1.png.array.npz"}


def dark(model, images_BCHW, *, target=None):
    maps = bright(model, images_BCHW)
    return dataclasses.replace(maps, heatmaps=1 - maps.heatmaps, method="dark")


def test_several_methods_are_told_of_one_by_one(tmp_path):
    photos(tmp_path / "in", 4)
    model = Tiny()
    views = [
        View(model, Preprocess(16), bright, CLASSES, "tiny", "bright"),
        View(model, Preprocess(24), dark, CLASSES, "tiny", "dark"),
    ]
    run([tmp_path / "in"], tmp_path / "out", views=views, save=("overlay", "array"))
    entry = manifest(tmp_path / "out")["0.png"]
    first, second = entry["looks"]
    assert (first["name"], second["name"]) == ("bright", "dark")
    for key in ("model", "method", "layer", "prediction", "class", "probability", "peak"):
        assert entry[key] == first[key]
    tensor, placement = Preprocess(24)(noise(20, 30, 0))
    heatmap = 1 - bright(model, torch.from_numpy(tensor)[None]).heatmaps[0].numpy()
    assert second["peak"] == [round(place, 1) for place in peak(heatmap, placement)]
    arrays = np.load(tmp_path / "out" / "0.png.array.npz")
    np.testing.assert_allclose(arrays["dark/heatmap"], heatmap, atol=1e-6)
    assert run([tmp_path / "in"], tmp_path / "out", views=views, save=("overlay", "array")).skipped == 4
    assert run([tmp_path / "in"], tmp_path / "out", views=views[::-1]).written == 4
    with pytest.raises(UsageError, match="needs a name of its own"):
        run([tmp_path / "in"], tmp_path / "out", views=[views[0], views[0]])
    with pytest.raises(UsageError, match="two views can be compared, not 1"):
        run([tmp_path / "in"], tmp_path / "out", compare=True)


def test_two_models_are_compared_where_they_differ(tmp_path):
    photos(tmp_path / "in", 3)
    views = [View(Tiny(), Preprocess(16), bright, name="old"), View(other_weights(), Preprocess(16), dark, name="new")]
    run([tmp_path / "in"], tmp_path / "out", views=views, compare=True, save=("overlay", "difference"))
    for name, entry in manifest(tmp_path / "out").items():
        tensor, placement = Preprocess(16)(np.array(Image.open(tmp_path / "in" / name)))
        heatmap = bright(Tiny(), torch.from_numpy(tensor)[None]).heatmaps[0].numpy()
        apart = np.abs(1 - 2 * placement.carry(heatmap))[placement.seen()]
        assert entry["difference"]["mean"] == pytest.approx(apart.mean(), abs=1e-4)
        x, y = entry["difference"]["peak"]
        assert np.abs(1 - 2 * placement.carry(heatmap)[int(y), int(x)]) == pytest.approx(apart.max(), abs=1e-4)
        assert [look["name"] for look in entry["looks"]] == ["old", "new"]


def test_a_list_says_what_to_explain_and_what_to_draw(tmp_path):
    photos(tmp_path / "in", 5)
    lines = [
        "path,target,x0,y0,x1,y1,label",
        "0.png,dog",
        "1.png,0,2,2,20,15,thing",
        "2.png",
        "3.png,wolf",
        "4.png,99",
        "gone.png",
    ]
    (tmp_path / "in" / "list.csv").write_text("\n".join(lines))
    options = {"method": GradCAM(), "class_names": CLASSES, "style": Style(suffix=".png")}
    summary = run([tmp_path / "in" / "list.csv"], tmp_path / "out", **options)
    entries = manifest(tmp_path / "out")
    assert [entries[f"{number}.png"]["target"] for number in range(2)] == [1, 0]
    assert entries["2.png"]["target"] == entries["2.png"]["prediction"]
    assert "no class 'wolf'" in entries["3.png"]["reason"]
    assert "out of range: the model has 3 outputs" in entries["4.png"]["reason"]
    assert entries["gone.png"]["reason"].startswith("there is no")
    assert (summary.written, summary.failed) == (3, 3)
    run([tmp_path / "in"], tmp_path / "plain", target=0, **options)
    with_box, without = (np.array(Image.open(tmp_path / out / "1.png.overlay.png")) for out in ("out", "plain"))
    rows, columns = np.nonzero((with_box != without).any(2))
    assert (rows.min(), columns.min()) == (2, 2)
    assert (with_box != without).any(2)[14, 2:20].all()
    assert run([tmp_path / "in" / "list.csv"], tmp_path / "out", **options).skipped == 3
    (tmp_path / "in" / "list.csv").write_text("\n".join(lines).replace("0.png,dog", "0.png,cat"))
    assert run([tmp_path / "in" / "list.csv"], tmp_path / "out", **options).written == 1


def test_a_target_may_be_a_class_name_and_a_wrong_one_is_told(tmp_path):
    photos(tmp_path / "in", 2)
    options = {"method": GradCAM(), "class_names": CLASSES}
    run([tmp_path / "in"], tmp_path / "out", target="owl", **options)
    assert manifest(tmp_path / "out")["0.png"]["target"] == 2
    with pytest.raises(UsageError, match=r"no class 'oul'\. Nearest: owl"):
        run([tmp_path / "in"], tmp_path / "out", target="oul", **options)


def test_a_video_becomes_a_video_that_shows_every_frame(tmp_path):
    shades = [20 + 18 * number for number in range(9)]
    path = film(tmp_path / "in.mp4", shades, size=(32, 64))
    photos(tmp_path / "in", 4)
    inputs = [tmp_path / "in", path]
    summary = run(inputs, tmp_path / "out", save=("overlay", "array", "heatmap"), fps=5)
    assert (summary.written, summary.failed) == (5, 0)
    entry = manifest(tmp_path / "out")["in.mp4"]
    assert entry["outputs"] == {
        "overlay": "in.mp4.overlay.mp4",
        "array": "in.mp4.array.npz",
        "heatmap": "in.mp4.heatmap.mp4",
    }
    frames = entry["frames"]
    assert frames["at"] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert {len(column) for column in frames.values()} == {5}
    surest = int(np.argmax(frames["probability"]))
    for key in ("prediction", "probability", "peak"):
        assert entry[key] == frames[key][surest]
    model = Tiny().eval()
    arrays = np.load(tmp_path / "out" / "in.mp4.array.npz")
    for number, (_, picture) in enumerate(Frames(str(path), fps=5, max_pixels=10**6)):
        tensor, _ = Preprocess(16)(picture)
        maps = bright(model, torch.from_numpy(tensor)[None])
        assert frames["probability"][number] == pytest.approx(float(maps.output.softmax(1).max()), abs=2e-6)
        np.testing.assert_allclose(arrays["heatmap"][number], maps.heatmaps[0], atol=1e-6)
    shown = [picture for _, picture in Frames(str(tmp_path / "out" / "in.mp4.overlay.mp4"), max_pixels=10**6)]
    assert [picture.shape for picture in shown] == [(32, 64, 3)] * 5
    dark_to_bright = [picture[:, :8].mean() for picture in shown]  # outside of the crop the frames are only darker
    assert sorted(dark_to_bright) == dark_to_bright
    before = snapshot(tmp_path / "out")
    assert run(inputs, tmp_path / "out", save=("overlay", "array", "heatmap"), fps=5).skipped == 5
    assert snapshot(tmp_path / "out") == before
    assert run(inputs, tmp_path / "out", save=("overlay",), fps=2).written == 1  # pictures have no rate
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("way", ["no video", "no frame", "not finite", "full disk"])
def test_a_video_that_fails_leaves_nothing_behind_and_the_others_are_made(tmp_path, way):
    photos(tmp_path / "in", 2)
    path = film(tmp_path / "x.mp4", [250 if number == 4 else 90 for number in range(6)], size=(320, 320))
    method, limit = bright, 10**9

    def picky(model, images_BCHW, *, target=None):
        if (images_BCHW.mean((1, 2, 3)) > 2).any():
            raise DataError("the images hold NaN or infinity")
        return bright(model, images_BCHW)

    if way == "no video":
        path.write_bytes(b"nothing")
    elif way == "no frame":
        film(path, [])
    elif way == "not finite":
        method = picky
    else:
        limit = 3000
    with disk_full_after(limit):
        summary = run([tmp_path / "in", path], tmp_path / "out", method=method, save=("overlay", "array"))
    assert (summary.written, summary.failed) == (2, 1)
    reason = manifest(tmp_path / "out")["x.mp4"]["reason"]
    expected = {"not finite": "NaN or infinity", "full disk": "cannot be written"}.get(way, "no video that|no frame")
    assert re.search(expected, reason)
    assert not [name for name in os.listdir(tmp_path / "out") if "x.mp4" in name or name.startswith(".")]


def test_files_are_safe_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    photos(tmp_path / "in", 5)
    synced, named = {}, []
    fsync, replace = os.fsync, os.replace

    def syncing(handle):
        fsync(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    def naming(source, target):
        promises = tmp_path / "out" / ".manifest.promised"
        promised = promises.read_bytes()[: synced[promises.stat().st_ino]]  # what a power cut would leave
        known = os.path.basename(target).encode() in promised
        named.append((synced[os.stat(source).st_ino] == os.stat(source).st_size, known, os.path.exists(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)

    monkeypatch.setattr(os, "replace", naming)
    run([tmp_path / "in"], tmp_path / "out")
    assert named == [(True, True, False)] * 5


def test_half_precision_runs_the_model_in_bfloat16_and_is_another_recipe(tmp_path):
    photos(tmp_path / "in", 2)
    seen = []
    model = Tiny()
    model.conv.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    run([tmp_path / "in"], tmp_path / "out", model=model)
    whole = manifest(tmp_path / "out")["0.png"]
    assert run([tmp_path / "in"], tmp_path / "out", model=model, bf16=True).written == 2
    half = manifest(tmp_path / "out")["0.png"]
    assert seen == [torch.float32, torch.bfloat16]
    assert half["probability"] == pytest.approx(whole["probability"], abs=0.02)


def test_batches_are_smaller_the_larger_the_input_is():
    def fitting(*sizes):
        return _fitting([View(Tiny(), Preprocess(size)) for size in sizes])

    assert [fitting(224), fitting(448), fitting((480, 640)), fitting(64), fitting(4000)] == [16, 4, 2, 196, 1]
    assert fitting(224, 448) == 4


@pytest.mark.parametrize("way", ["unwritable", "read-only manifest"])
def test_a_folder_that_cannot_be_written_is_told_and_the_exit_code_says_so(tmp_path, way, monkeypatch):
    photos(tmp_path / "in" / "a", 2)
    photos(tmp_path / "in" / "b", 2)
    real = os.makedirs

    def refusing(path, *args, **options):
        if os.fspath(path).endswith("a" if way == "unwritable" else "out"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "makedirs", refusing)
    if way == "unwritable":
        summary = run([tmp_path / "in"], tmp_path / "out")
        assert (summary.written, summary.failed, summary.exit_code) == (2, 2, 1)
        assert all(
            reason == "cannot be made: Permission denied" or "cannot be made" in reason
            for _, reason in summary.failures
        )
    else:
        with pytest.raises(DataError, match="Permission denied"):
            run([tmp_path / "in"], tmp_path / "out")


class Detector(nn.Module):
    """Always finds the same in the input: one thing for sure, and one that it doubts."""

    def forward(self, images_BCHW):
        found = {
            "boxes": torch.tensor([[2.0, 4.0, 10.0, 12.0], [0.0, 0.0, 3.0, 3.0]]),
            "scores": torch.tensor([0.9, 0.2]),
            "labels": torch.tensor([1, 0]),
        }
        return [found for _ in images_BCHW]


def shown_by_a_detector(model, images_BCHW, *, target=None):
    return dataclasses.replace(bright(Tiny(), images_BCHW), output=model(images_BCHW))


def test_what_a_detector_found_is_drawn_where_it_lies_in_the_source(tmp_path):
    save(tmp_path / "in" / "x.png", noise(40, 60))
    options = {"method": shown_by_a_detector, "class_names": CLASSES, "style": Style(suffix=".png")}
    run([tmp_path / "in"], tmp_path / "out", model=Detector(), **options)
    entry = manifest(tmp_path / "out")["x.png"]
    ((left, top, right, bottom, label),) = entry["found"]
    # a crop of 40 × 40 from column 10 on, which the input of 16 × 16 shows
    assert [left, top, right, bottom] == pytest.approx([10 + 2 * 2.5, 4 * 2.5, 10 + 10 * 2.5, 12 * 2.5], abs=0.2)
    assert label == "dog 0.90"
    assert entry["prediction"] is None
    run([tmp_path / "in"], tmp_path / "plain", **{**options, "method": bright})
    with_box, without = (np.array(Image.open(tmp_path / out / "x.png.overlay.png")) for out in ("out", "plain"))
    changed = (with_box != without).any(2)
    assert changed[10:30, 15].all()
    assert changed[29, 15:35].all()
    assert not changed[31:].any()
