"""What glimpses cost: CPU time on one thread, fp32.

    python tests/benchmarks/glimpse.py [--json FILE] [--rounds N] [--rows NAME ...]

`retina_28`, `retina_60x3` and `retina_224rgb` are how many times faster our retina is than a plain one that pads the
batch and crops image by image with .item(), as public code does, for six looks at a batch; ours prepares the batch
once and then looks. On 28 and 60 pixels it is the exact one. On 224 it is the one that looks between pixels;
`retina_224rgb_exact` is the exact one there, which has no goal. `train_step_28` is the throughput of a training step
(six glimpses of 8 × 8, batch 128, one rollout) over that of its matrix products alone, forward and backward. Ratios are
medians over rounds of CPU time, each job right before and after the other. Goals are those of the project.
"""

import argparse
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F

from visionattn.attention import Gaussian, Retina
from visionattn.models import GlimpseNetwork, MLPEncoder
from visionattn.tasks import reinforce

LOOKS = 6
RETINAS = {  # batch, channels, side, patch, scales, between pixels, goal
    "retina_28": (128, 1, 28, 8, 1, False, 20),
    "retina_60x3": (128, 1, 60, 12, 3, False, 10),
    "retina_224rgb": (16, 3, 224, 32, 3, True, 10),
    "retina_224rgb_exact": (16, 3, 224, 32, 3, False, None),
}


def times_faster(plain, ours, rounds, repeats):
    """Median of the CPU time of a plain job over that of ours, which runs `repeats` times between two of it."""
    spent(plain, 1), spent(ours, 1)
    found, before = [], spent(plain, 1)
    for _ in range(rounds):
        own, after = spent(ours, repeats), spent(plain, 1)
        found.append((before + after) / 2 / own)
        before = after
    return statistics.median(found)


def spent(job, repeats):
    start = time.process_time()
    for _ in range(repeats):
        job()
    return (time.process_time() - start) / repeats


def plain_glimpse(images, locations, patch, scales):
    """Patches of every scale, image by image."""
    side = images.shape[-1]
    seen = []
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
        seen.append(F.avg_pool2d(crop, 2**scale) if scale else crop)
    return torch.cat(seen, 1)


def retina_row(batch, channels, side, patch, scales, between, rounds):
    torch.manual_seed(0)
    images = torch.rand(batch, channels, side, side)
    looks = [torch.rand(batch, 2) * 2 - 1 for _ in range(LOOKS)]
    retina = Retina(patch, scales=scales, subpixel=between)

    def plain():
        for look in looks:
            plain_glimpse(images, look, patch, scales)

    def ours():
        view = retina.view(images)
        for look in looks:
            retina.look(view, look[:, None])

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

    products = []  # (in, out) of every matrix of one glimpse
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
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="all unless given")
    options = parser.parse_args()
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
