"""Measure the cost of attention mechanisms: CPU time on two threads, fp32.

    python tests/benchmarks/soft_attention.py [--json FILE] [--rounds N] [--rows NAME ...] [--device cuda]

- `train_NAME`: time of a training step of ResNet-18 at 160 px with the mechanism at the end of every block ÷ time of a
  step without the mechanism.
- `timm_NAME`: time of our mechanism ÷ time of timm's, each for forward and backward. The features are those of the
  network's first stage, or smaller if every position attends to every other.
- `max_delta_logit`: the largest change of any logit of ResNet-18 when a mechanism is inserted.

Each ratio is the median over rounds, in which the two jobs run in turns, so that other load on the machine slows both.
If other jobs use the memory bandwidth, mechanisms are slowed more than convolutions, because they mostly read and write
x. The goals are the project's goals.

Some training rows miss their goal. Their equations contain more work than a gate on pooled features:

- LSKA applies four depthwise convolutions and a dense 1 × 1 convolution to x. EMA applies a 3 × 3 convolution and a
  normalisation to x.
- TripletAttention has three 7 × 7 convolutions, two of them over planes of channels × rows or columns.
- BAM computes a logit for every value of x, and has four convolutions with normalisations at every position.
- GatherExcite has two depthwise convolutions over every channel.
- CBAM and LightCBAM gate twice, with a mean and a maximum before each gate. `gate_ops.pooled` computes
  the gradients of x, its mean and its maximum in one pass. This reduced their rows from 1.11 and 1.12 to 1.10 and 1.11,
  and TripletAttention's from 1.27 to 1.25 (measured in pairs on one thread of a busy machine).
- CoordinateAttention and ELA gate along two axes. They meet the goal within the differences between runs.
"""

import argparse
import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait would add CPU time

import timm
import torch
from timm.layers import create_attn

from tests.benchmarks.timing import add_device, ratio, use_device
from visionattn import attention

BATCH = 8
GATES = (
    *("SE", "EffectiveSE", "ECA", "CircularECA", "WideECA", "GCT", "FcaNet", "GatherExcite", "LSKA"),
    *("CoordinateAttention", "SimpleCoordinateAttention", "ELA", "StripAttention"),
    *("CBAM", "LightCBAM", "BAM", "SimAM", "TripletAttention", "EMA", "GlobalContextGate"),
)
OTHERS = (
    *("GlobalContext", "DoubleAttention", "Lambda", "NonLocal", "DualAttention", "BottleneckAttention"),
    *("HaloAttention", "BilinearAttention", "SelectiveKernel", "SplitAttention"),
)
FEATURES = (BATCH, 64, 40, 40)  # the first stage of ResNet-18 at 160 px
SMALLER = (BATCH, 64, 14, 14)  # for mechanisms in which every position attends to every other
IN_TIMM = {  # our mechanism → (builder of timm's with the same widths, shape of the features)
    "SE": (partial(create_attn, "se", 64, rd_channels=4), FEATURES),
    "EffectiveSE": (partial(create_attn, "ese", 64), FEATURES),
    "ECA": (partial(create_attn, "eca", 64), FEATURES),
    "CircularECA": (partial(create_attn, "ceca", 64), FEATURES),
    "WideECA": (partial(create_attn, "ecam", 64, rd_channels=8), FEATURES),
    "GlobalContextGate": (partial(create_attn, "gc", 64), FEATURES),
    "GlobalContext": (partial(create_attn, "gca", 64), FEATURES),
    "CBAM": (partial(create_attn, "cbam", 64, rd_channels=4), FEATURES),
    "LightCBAM": (partial(create_attn, "lcbam", 64, rd_channels=4), FEATURES),
    "CoordinateAttention": (partial(create_attn, "coord", 64, rd_channels=8), FEATURES),
    "SimpleCoordinateAttention": (partial(create_attn, "scoord", 64, rd_channels=8), FEATURES),
    "ELA": (partial(create_attn, "ela", 64), FEATURES),
    "StripAttention": (partial(create_attn, "strip", 64), FEATURES),
    "GatherExcite": (partial(create_attn, "ge", 64, extent=4, use_mlp=False), FEATURES),
    "SelectiveKernel": (partial(create_attn, "sk", 64, split_input=False, rd_channels=32), FEATURES),
    "SplitAttention": (partial(create_attn, "splat", 64, norm_layer=torch.nn.BatchNorm2d), FEATURES),
    "NonLocal": (partial(create_attn, "nl", 64), FEATURES),
    "BilinearAttention": (partial(create_attn, "bat", 64, rd_channels=16), SMALLER),
    "Lambda": (partial(create_attn, "lambda", 64), SMALLER),
    "BottleneckAttention": (partial(create_attn, "bottleneck", 64, feat_size=(14, 14)), SMALLER),
    "HaloAttention": (partial(create_attn, "halo", 64), (BATCH, 64, 16, 16)),
}
OURS = {"GatherExcite": partial(attention.GatherExcite, learned=False)}  # timm's cannot be built with weights
TRAIN_GOAL, TIMM_GOAL = 1.10, 1.05


def training_step(mechanism):
    torch.manual_seed(0)
    options = {}
    if mechanism is not None:
        options = {"block_args": {"attn_layer": lambda channels, **_: mechanism(channels)}}
    model = timm.create_model("resnet18", num_classes=10, **options)
    # with this tiny learning rate the weights hardly change, so no value becomes denormal or saturated
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    images, labels = torch.randn(BATCH, 3, 160, 160), torch.randint(10, (BATCH,))

    def step():
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()

    return step


def forward_and_backward(module, shape):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(shape)
    return lambda: module(x).backward(grad)


@torch.no_grad()
def max_delta_logit():
    """Return the largest change of any logit when a mechanism is inserted after every stage of ResNet-18."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18").eval()
    images = torch.randn(2, 3, 160, 160)
    before, largest = model(images), 0.0
    for name in GATES + OTHERS:
        inserted = attention.insert(model, getattr(attention, name), at="stages", preserve=True)
        largest = max(largest, float((model(images) - before).abs().max()))
        inserted.remove()
    return largest


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--rows", nargs="+", metavar="NAME", help="rows to measure, e.g. train_SE timm_ECA (default: all)"
    )
    add_device(parser)
    options = parser.parse_args()
    use_device(options.device)
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    results = []

    def report(name, value, goal):
        results.append({"name": name, "value": float(f"{value:.4g}"), "goal": goal, "better": "lower"})
        print(f"{name:32s} {value:7.4g}  ≤ {goal}  {'ok' if value <= goal else 'MISSED'}", flush=True)

    def wanted(row):
        return options.rows is None or row in options.rows

    plain = training_step(None)
    for name in GATES:
        if wanted(f"train_{name}"):
            value = ratio(training_step(getattr(attention, name)), plain, options.rounds)
            report(f"train_{name}", value, TRAIN_GOAL)
    for name, (theirs, shape) in IN_TIMM.items():
        if wanted(f"timm_{name}"):
            ours = forward_and_backward(OURS.get(name, getattr(attention, name))(shape[1]), shape)
            value = ratio(ours, forward_and_backward(theirs(), shape), options.rounds, repeats=9)
            report(f"timm_{name}", value, TIMM_GOAL)
    if wanted("max_delta_logit"):
        report("max_delta_logit", max_delta_logit(), 0)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
