"""Helpers for small exports: a model, a method with a known heatmap, pictures, and readers of output folders."""

import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import nn

from visionattn.data.placement import Preprocess
from visionattn.maps.method import Heatmaps
from visionattn.overlays.explainer import Explainer
from visionattn.overlays.folder.export import export


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x_BCHW):
        return self.head(4 * F.relu(self.conv(x_BCHW)).mean((2, 3)))


def bright(model, images_BCHW, *, target=None, contrast=1):
    """A method with a known heatmap: the brightness of each 2 × 2 cell of the input."""
    cells_Bhw = F.avg_pool2d(images_BCHW, 2).mean(1).mul(contrast)
    low, high = cells_Bhw.amin((1, 2), keepdim=True), cells_Bhw.amax((1, 2), keepdim=True)
    heatmaps_Bhw = (cells_Bhw - low) / (high - low).clamp(min=1e-6)
    return Heatmaps(heatmaps_Bhw, cells_Bhw, model(images_BCHW).detach(), None, "the input", "bright")


EXPLAINER = {"model", "preprocess", "method", "class_names", "model_name"}


def run(inputs, out, **options):
    explainer = {"model": Tiny(), "preprocess": Preprocess(16), "method": bright}
    explainer |= {name: options.pop(name) for name in EXPLAINER & options.keys()}
    options = {
        "explainers": Explainer(**explainer),
        "batch_size": 3,
        "workers": 2,
        "console": Console(quiet=True),
        **options,
    }
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
    assert len({entry["source"] for entry in entries}) == len(entries)  # one line per image
    return {os.path.basename(entry["source"]): entry for entry in entries}


def overlays(out):
    return {str(path.relative_to(out)) for path in out.rglob("*") if ".overlay." in path.name}


def snapshot(out):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}


def awkward(folder):
    """Write unusual and broken images: name → the expected (H, W, 3) picture, or a pattern of the error message."""
    folder.mkdir()
    picture = noise()
    save(folder / "rgb.png", picture)
    save(folder / "grey.png", picture[..., 0])
    Image.fromarray(picture).convert("CMYK").save(folder / "cmyk.jpg")
    grey_16_bit = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    save(folder / "16_bit.png", grey_16_bit)
    palette = Image.fromarray(picture).quantize(16)
    palette.info["transparency"] = 3
    palette.save(folder / "palette.png", transparency=3)
    rgb, indices = np.array(palette.convert("RGB")), np.array(palette)
    rgb[indices == 3] = 255  # transparent pixels are blended with white
    rgba = np.dstack([picture, np.full((20, 30), 128, np.uint8)])
    save(folder / "half_transparent.png", rgba)
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers rotate the image by 90° clockwise
    Image.fromarray(np.rot90(picture)).save(folder / "rotated.png", exif=exif)
    frames = [Image.fromarray(noise(seed=seed)).quantize(32) for seed in range(3)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:], duration=50)

    save(folder / "truncated.jpg", noise(200, 200))
    (folder / "truncated.jpg").write_bytes((folder / "truncated.jpg").read_bytes()[:9000])
    (folder / "empty.jpg").touch()
    (folder / "corrupt.jpg").write_bytes(np.random.default_rng(5).bytes(3000))
    save(folder / "header.png", picture)
    (folder / "header.png").write_bytes((folder / "header.png").read_bytes()[:40])
    save(folder / "huge.png", noise(200, 201))
    (folder / "dangling_link.jpg").symlink_to(folder / "nowhere")
    return {
        "rgb.png": picture,
        "grey.png": np.repeat(picture[..., :1], 3, 2),
        "cmyk.jpg": np.array(Image.open(folder / "cmyk.jpg").convert("RGB")),
        "16_bit.png": np.repeat(np.rint(grey_16_bit / 257).astype(np.uint8)[..., None], 3, 2),
        "palette.png": rgb,
        "half_transparent.png": np.rint(picture * (128 / 255) + 255 * (127 / 255)).astype(np.uint8),
        "rotated.png": picture,
        "animated.gif": np.array(frames[0].convert("RGB")),
        "truncated.jpg": "cut short",
        "empty.jpg": "is empty",
        "corrupt.jpg": "is not an image",
        "header.png": "damaged|cut short|is not an image",
        "huge.png": r"200 × 201|201 × 200",
        "dangling_link.jpg": "there is no",
    }


def other_weights():
    """Return the model with one weight changed by 1e-6."""
    model = Tiny()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] += 1e-6
    return model


def contents(out):
    return {name: (out / name).read_bytes() for name in overlays(out)}
