"""Measure the cost of glimpses: CPU time on one thread, fp32.

    python tests/benchmarks/glimpse.py [--json FILE] [--rounds N] [--rows NAME ...] [--device cuda]

- `retina_28`, `retina_60x3`, `retina_224rgb`: time of a simple retina ÷ time of `Retina`, for six glimpses per image.
  The simple retina pads the batch for every glimpse and crops image by image with `.item()`, as public code does;
  `Retina` prepares the batch once. On 28 and 60 pixels, both take whole pixels. On 224 pixels, `Retina` interpolates
  between pixels (`subpixel`).
- `retina_224rgb_exact`: the same on 224 pixels with whole pixels; this row has no goal.
- `train_step_28`: time of a training step's matrix products alone ÷ time of the whole step. Both include the forward
  and the backward pass, for six glimpses of 8 × 8, batch 128 and one rollout.

Each ratio is the median over rounds, in which the two jobs run in turns. The goals are our own, not those of a paper.
"""

import argparse
import json
import os
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F

from tests.benchmarks.timing import add_device, spent, use_device
from visionattn.attention import Gaussian, Retina
from visionattn.models import GlimpseNetwork, MLPEncoder
from visionattn.tasks import reinforce

LOOKS = 6
RETINAS = {  # batch, channels, side, patch, scales, subpixel, goal
    "retina_28": (128, 1, 28, 8, 1, False, 20),
    "retina_60x3": (128, 1, 60, 12, 3, False, 10),
    "retina_224rgb": (16, 3, 224, 32, 3, True, 10),
    "retina_224rgb_exact": (16, 3, 224, 32, 3, False, None),
}


def times_faster(plain, ours, rounds, repeats):
    """Return the median of (time of `plain`) ÷ (mean time of `repeats` runs of `ours`)."""
    spent(plain, 1), spent(ours, 1)  # warm up
    ratios, before = [], spent(plain, 1)
    for _ in range(rounds):
        own, after = spent(ours, repeats), spent(plain, 1)
        ratios.append((before + after) / 2 / own)
        before = after
    return statistics.median(ratios)


def plain_glimpse(images, locations, patch, scales):
    """Return the patches of every scale, cropped image by image."""
    side = images.shape[-1]
    patches = []
    for scale in range(scales):
        size = patch * 2**scale
        padded = F.pad(images, (size // 2,) * 4)
        start = (0.5 * (locations + 1) * side).long()
        end = start + size
        crops = [
            padded[i, :, start[i, 1].item() : end[i, 1].item(), start[i, 0].item() : end[i, 0].item()]
            for i in range(len(images))
        ]
        crop = torch.stack(crops)
        patches.append(F.avg_pool2d(crop, 2**scale) if scale else crop)
    return torch.cat(patches, 1)


def retina_row(batch, channels, side, patch, scales, subpixel, rounds):
    torch.manual_seed(0)
    images = torch.rand(batch, channels, side, side)
    locations = [torch.rand(batch, 2) * 2 - 1 for _ in range(LOOKS)]
    retina = Retina(patch, scales=scales, subpixel=subpixel)

    def plain():
        for location in locations:
            plain_glimpse(images, location, patch, scales)

    def ours():
        view = retina.view(images)
        for location in locations:
            retina.look(view, location[:, None])

    with torch.no_grad():
        return times_faster(plain, ours, rounds, 5)


def train_step(rounds):
    torch.manual_seed(0)
    network = GlimpseNetwork(10, retina=Retina(8), policy=Gaussian, encoder=MLPEncoder, num_glimpses=LOOKS, in_chans=1)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    images, labels = torch.rand(128, 1, 28, 28), torch.randint(10, (128,))

    def step():
        rollout = network.rollout(images)
        returns = reinforce.log_likelihood(rollout.logits.detach(), labels, LOOKS - 1)
        loss = F.cross_entropy(rollout.logits[:, 0, -1], labels)
        loss = loss + reinforce.policy_loss(rollout.log_prob, returns - reinforce.batch_mean(returns))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    products = []  # (inputs, outputs) of every weight matrix that one glimpse uses
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            products.append((module.in_features, module.out_features))
        elif isinstance(module, torch.nn.LSTMCell):
            products += [(module.input_size, 4 * module.hidden_size), (module.hidden_size, 4 * module.hidden_size)]
    factors = [(torch.rand(128, i), torch.rand(i, o), torch.rand(128, o)) for i, o in products]

    def matrices():
        for _ in range(LOOKS):
            for x, weight, gradient in factors:
                x @ weight
                x.T @ gradient
                gradient @ weight.T

    return times_faster(matrices, step, rounds, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="rows to measure (default: all)")
    add_device(parser)
    options = parser.parse_args()
    use_device(options.device)
    torch.set_num_threads(1)
    rows = {name: (partial(retina_row, *setting[:-1]), setting[-1]) for name, setting in RETINAS.items()}
    rows["train_step_28"] = (train_step, 0.75)
    results = []
    for name, (measure, goal) in rows.items():
        if options.rows is None or name in options.rows:
            value = measure(rounds=options.rounds)
            results.append({"name": name, "value": float(f"{value:.4g}"), "goal": goal, "better": "higher"})
            verdict = "" if goal is None else f"≥ {goal}  {'ok' if value >= goal else 'MISSED'}"
            print(f"{name:24s} {value:7.4g}  {verdict}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
