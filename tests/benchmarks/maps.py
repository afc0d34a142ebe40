"""Measure the cost of capture and of heatmap methods: CPU time and peak memory, on two threads, fp32.

    python tests/benchmarks/maps.py [--json FILE] [--models small base] [--rounds N] [--rows NAME ...]
        [--device cuda]

Times are ratios to the model's forward pass with fused attention. Each ratio is the median over rounds; in a round,
every row runs between two forward passes, so that other load on the machine slows all of them. The table also has the
wall time, which is valid only on a machine without other load. Memory is the peak above the loaded model, measured in
one process per row. The rows `peer_…` are other packages, for comparison. GOALS are the project's goals.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait would add CPU time

import timm
import torch

from tests.benchmarks.timing import add_device, clock, use_device
from visionattn.capture import ClassRow, HeadMean, capture, keep_freed_memory
from visionattn.maps import BeyondIntuition, Chefer, GradCAM, GradientAttention, LeGrad, Rollout, TokenTM

MODELS = {"small": "vit_small_patch16_224", "base": "vit_base_patch16_384"}
BATCH = 8
GOALS = {
    "cls_last": (1.02, 1.02),
    "cls_all": (1.04, 1.02),
    "head_mean": (1.06, 1.03),
    "rollout": (1.05, 1.02),
    "grad_attention": (1.08, 1.05),
    "gradcam": (1.12, 1.10),
    "legrad": (1.15, 1.12),
    "tokentm": (1.25, 1.20),
    "beyond_intuition": (1.25, 1.20),
    "chefer": (None, None),
    "peer_gradcam": (None, None),
    "peer_extract": (None, None),
}
MEMORY_GOALS = {"cls_all": (80, 330), "rollout": (100, 360), "gradcam": (100, 400)}


def load(size):
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = timm.create_model(MODELS[size]).eval()
    return model, torch.randn(BATCH, *model.default_cfg["input_size"])


def forward(model, images):
    with torch.no_grad():
        return model(images)


def recorded(reduction, layers=None):
    def run(model, images):
        with torch.no_grad(), capture(model, reduction, layers=layers) as records:
            model(images)
        return records

    return run


def peer_gradcam(model, images):
    """Run pytorch-grad-cam, used as in its README for a ViT."""
    from pytorch_grad_cam import GradCAM as PeerGradCAM

    def to_maps(tokens):
        side = int((tokens.shape[1] - 1) ** 0.5)
        return tokens[:, 1:].reshape(len(tokens), side, side, -1).permute(0, 3, 1, 2)

    with PeerGradCAM(model, [model.blocks[-1].norm1], to_maps) as cam:
        return cam(images, None)


def peer_extract(model, images):
    """Run timm's AttentionExtract for the whole maps of every layer. It needs unfused attention."""
    from timm.utils import AttentionExtract

    modules = [module for module in model.modules() if hasattr(module, "fused_attn")]
    try:
        for module in modules:
            module.fused_attn = False
        with torch.no_grad():
            return AttentionExtract(model, method="hook")(images)
    finally:
        for module in modules:
            module.fused_attn = True


ROWS = {
    "forward": forward,
    "cls_last": recorded(ClassRow(), layers=[-1]),
    "cls_all": recorded(ClassRow()),
    "head_mean": recorded(HeadMean()),
    "rollout": lambda model, images: Rollout()(model, images),
    "grad_attention": lambda model, images: GradientAttention()(model, images),
    "gradcam": lambda model, images: GradCAM()(model, images),
    "legrad": lambda model, images: LeGrad()(model, images),
    "tokentm": lambda model, images: TokenTM()(model, images),
    "beyond_intuition": lambda model, images: BeyondIntuition()(model, images),
    "chefer": lambda model, images: Chefer()(model, images),
    "peer_gradcam": peer_gradcam,
    "peer_extract": peer_extract,
}


def ratios(size, names, rounds):
    """Return for each row the median ratio to the forward passes before and after the row: (CPU time, wall time)."""
    keep_freed_memory()  # as the command line does
    model, images = load(size)
    for name in ["forward", *names]:  # the first run is not measured, since it allocates memory and surveys the model
        spent(name, model, images)
    found = {name: [] for name in names}
    before = spent("forward", model, images)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            row, after = spent(name, model, images), spent("forward", model, images)
            found[name].append([2 * r / (b + a) for r, b, a in zip(row, before, after, strict=True)])
            before = after
    return {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in found.items()}


def spent(name, model, images):
    own, wall = clock(), time.perf_counter()
    ROWS[name](model, images)
    return clock() - own, time.perf_counter() - wall


def peak_megabytes(size, name):
    """Return the peak of memory above the loaded model: of this process or, on a GPU, of its tensors."""
    model, images = load(size)
    if torch.get_default_device().type == "cuda":
        forward(model, images)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ROWS[name](model, images)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    forward(model, images[:1])  # allocates the thread pools and the kernels' buffers, which are not to be measured
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak that the kernel has recorded
    before = _status("VmRSS")
    ROWS[name](model, images)
    return (_status("VmHWM") - before) / 1024


def _status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "ROW"), help=argparse.SUPPRESS)
    add_device(parser)
    options = parser.parse_args()
    use_device(options.device)
    warnings.simplefilter("ignore")
    if options.peak:
        print(peak_megabytes(*options.peak))
        return
    results = []

    def report(name, value, goal, note=""):
        results.append({"name": name, "value": round(value, 4), "goal": goal, "better": "lower"})
        verdict = "" if goal is None else f"  ≤ {goal:<4}  {'ok' if value <= goal else 'MISSED'}"
        print(f"{name:28s} {value:9.3f}{verdict}{note}", flush=True)

    for size in options.models:
        column = list(MODELS).index(size)
        rounds = options.rounds if size == "small" else max(3, options.rounds // 2)
        for name, (cpu, wall) in ratios(size, options.rows, rounds).items():
            report(f"{name}_{size}", cpu, GOALS[name][column], f"  wall {wall:.3f}")
        if options.no_memory:
            continue
        for name in ["forward", *options.rows]:
            command = [sys.executable, __file__, "--device", options.device, "--peak", size, name]
            value = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            report(f"{name}_mb_{size}", value, MEMORY_GOALS[name][column] if name in MEMORY_GOALS else None)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
