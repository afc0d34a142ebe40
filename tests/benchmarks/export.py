"""Compare the speed of `export` with that of the model alone: 200 JPEGs of 640 × 480, two threads, fp32.

    python tests/benchmarks/export.py [--json FILE] [--rows NAME ...] [--rounds N] [--images N] [--device cuda]

- `resnet50_224`, `vit_small_224`: images/s of `export` (default method, overlays in full size) ÷ images/s of the
  model's forward pass on batches of 16 in memory. Both run in one process, in turns.
- `vs_gradcam_loop`: images/s of `export` ÷ images/s of pytorch-grad-cam, used as in its README: one image at a time,
  overlays of 224 × 224.
- `resnet50_480x640`: images/s of `export` ÷ images/s of the forward pass on batches of 16. The forward pass runs in
  another process, with the default settings of malloc.
- `memory_growth`: peak memory of an export of 1,000 images ÷ peak memory of an export of 200 images.

Weights are random. The ratios are valid only on a machine without other load. GOALS are the project's goals.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the command line does
sys.path.insert(0, str(Path(__file__).parents[2]))

import cv2
import numpy as np
import timm
import torch
from PIL import Image
from rich.console import Console

from tests.benchmarks.timing import add_device, wall_clock
from visionattn.data.decode import read_image
from visionattn.data.placement import Preprocess
from visionattn.overlays.explainer import Explainer
from visionattn.overlays.folder.export import export

GOALS = {
    "resnet50_224": (0.90, "higher"),
    "vit_small_224": (0.90, "higher"),
    "vs_gradcam_loop": (4.0, "higher"),
    "resnet50_480x640": (2.0, "higher"),
    "memory_growth": (1.05, "lower"),
}
COUNT, BATCH = 200, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_images(folder, count=COUNT):
    """Write images similar to photographs: soft shapes of all sizes and a little noise, about 90 kB each."""
    random = np.random.default_rng(0)
    noise = random.normal(0, 6, (480, 640, 3)).astype(np.float32)
    for number in range(count):
        image = np.roll(noise, number, axis=(0, 1)) + 110
        for channel in range(3):
            y, x, size = random.uniform(0, 480, 12), random.uniform(0, 640, 12), random.uniform(10, 160, 12)
            down = np.exp(-(((np.arange(480)[:, None] - y) / size) ** 2)) * random.uniform(-110, 110, 12)
            image[..., channel] += down @ np.exp(-(((np.arange(640) - x[:, None]) / size[:, None]) ** 2))
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / f"{number:04}.jpg", quality=90)


def build(name, device):
    torch.manual_seed(0)
    torch.set_num_threads(2)
    return timm.create_model(name).eval().to(device)


def plain_rate(model, size, count, batch=BATCH):
    images = torch.randn(batch, 3, *size).to(next(model.parameters()).device)
    batches = max(1, count // batch)
    with torch.no_grad():
        model(images)
        started = wall_clock()
        for _ in range(batches):
            model(images)
    return batches * batch / (wall_clock() - started)


def export_rate(model, size, folder):
    """Return images/s of a whole export, from the first batch to the finished manifest, after an export to warm up."""
    paths = sorted(folder.iterdir())
    with tempfile.TemporaryDirectory() as out:
        explainer = Explainer(model, Preprocess(size, crop_fraction=0.875 if size[0] == size[1] else 1.0))
        quiet = Console(quiet=True)
        export(paths[:BATCH], f"{out}/warm", explainer, console=quiet)
        started = time.perf_counter()
        summary = export(paths, f"{out}/all", explainer, console=quiet)
        assert summary.written == len(paths)
        return len(paths) / (time.perf_counter() - started)


def peer_rate(model, folder, count):
    """Return images/s of pytorch-grad-cam, used as in its README: one image at a time."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import preprocess_image, show_cam_on_image

    paths = sorted(folder.iterdir())[:count]
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as out, GradCAM(model=model, target_layers=[model.layer4[-1]]) as cam:
        for number, path in enumerate([paths[0], *paths]):
            if number == 1:  # the first image only warms up
                started = time.perf_counter()
            image = np.float32(cv2.resize(read_image(path), (224, 224))) / 255
            grey = cam(input_tensor=preprocess_image(image, mean=MEAN, std=STD).to(device), targets=None)[0]
            cv2.imwrite(f"{out}/{path.name}", show_cam_on_image(image, grey, use_rgb=True)[..., ::-1])
        return count / (time.perf_counter() - started)


def in_turns(measure, measure_reference, rounds):
    """Return the median of rate ÷ (mean reference rate before and after), and the two rates of that round."""
    before, measured = measure_reference(), []
    for _ in range(rounds):
        rate = measure()
        after = measure_reference()
        measured.append((2 * rate / (before + after), rate, after))
        before = after
    return sorted(measured)[len(measured) // 2]


def against_plain(name, size, folder, rounds, device):
    model, count = build(name, device), len(list(folder.iterdir()))
    return in_turns(lambda: export_rate(model, size, folder), lambda: plain_rate(model, size, count), rounds)


def against_peer(folder, rounds, device):
    model = build("resnet50", device)
    return in_turns(
        lambda: export_rate(model, (224, 224), folder), lambda: peer_rate(model, folder, COUNT // 5), rounds
    )


def large_inputs(folder, rounds, device):
    """Compare with the forward pass in another process, which has malloc's default settings.

    These settings slow large batches more than small ones, so the rate on batches of 2 is printed too: `export` also
    uses small batches for inputs of this size.
    """

    def plain():
        return float(in_own_process("--plain", str(BATCH), "--device", device))

    rate = float(in_own_process("--plain", "2", "--device", device))
    print(f"{'':20s} forward pass on batches of 2: {rate:.1f} images/s", flush=True)
    model = build("resnet50", device)
    with tempfile.TemporaryDirectory() as few:
        for path in sorted(folder.iterdir())[: COUNT // 5]:
            shutil.copy(path, few)
        return in_turns(lambda: export_rate(model, (480, 640), Path(few)), plain, max(1, rounds // 3))


def memory(folder, device):
    options = ["--device", device]
    peaks = [
        statistics.median(float(in_own_process("--peak", str(count), str(folder), *options)) for _ in range(3))
        for count in (1000, 200)
    ]
    return peaks[0] / peaks[1], *peaks


def in_own_process(*options):
    """Run this file with the options in a new process, and return the last line that it prints."""
    return subprocess.run(
        [sys.executable, __file__, *options], check=True, capture_output=True, text=True
    ).stdout.splitlines()[-1]


def peak_megabytes(count, folder, device):
    model = build("resnet18", device)
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "in").mkdir()
        paths = sorted(folder.iterdir())
        for number in range(count):
            os.link(paths[number % len(paths)], Path(place) / "in" / f"{number:04}.jpg")
        explainer = Explainer(model, Preprocess(224, crop_fraction=0.875))
        export([Path(place) / "in"], Path(place) / "out", explainer, console=Console(quiet=True))
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=COUNT, help="number of images (default: %(default)s)")
    add_device(parser)
    parser.add_argument("--plain", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    device, rounds = options.device, options.rounds
    if options.plain:
        print(plain_rate(build("resnet50", device), (480, 640), max(8, 2 * options.plain), options.plain))
        return
    if options.peak:
        print(peak_megabytes(int(options.peak[0]), Path(options.peak[1]), device))
        return
    rows = {
        "resnet50_224": lambda folder: against_plain("resnet50", (224, 224), folder, rounds, device),
        "vit_small_224": lambda folder: against_plain("vit_small_patch16_224", (224, 224), folder, rounds, device),
        "vs_gradcam_loop": lambda folder: against_peer(folder, rounds, device),
        "resnet50_480x640": lambda folder: large_inputs(folder, rounds, device),
        "memory_growth": lambda folder: memory(folder, device),
    }
    results = []
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), options.images)
        for name in options.rows:
            value, ours, theirs = rows[name](Path(folder))
            goal, better = GOALS[name]
            results.append({"name": name, "value": round(value, 4), "goal": goal, "better": better})
            good = value >= goal if better == "higher" else value <= goal
            sign, unit = ("≥", "images/s") if better == "higher" else ("≤", "MB")
            verdict = "ok" if good else "MISSED"
            print(
                f"{name:20s} {value:7.3f}  {sign} {goal:<4}  {verdict:6s}  {ours:.1f} and {theirs:.1f} {unit}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
