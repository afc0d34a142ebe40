"""What merging tokens saves: images/s of vit_small_patch16_224 in evaluation, 16 images, two threads, fp32.

    python tests/benchmarks/token_merging.py [--json FILE] [--rounds N]

Ratios to timm's own network, end to end, medians over rounds of CPU time, each to the pass right before and after it.
`token_merging` merges 13 pairs a block (ToMe); `token_pruning` keeps 0.7 at three blocks (EViT), and has no goal.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a waiting thread that spins would count as work

import timm
import torch

from visionattn.attention import TokenMerging, TokenPruning, reduce_tokens

REDUCTIONS = {"token_merging": (TokenMerging(13), 1.5), "token_pruning": (TokenPruning(0.7), None)}


@torch.inference_mode()
def speedup(reduction, rounds):
    """How many times as many images a ViT takes in a second of CPU time with its tokens reduced."""
    torch.manual_seed(0)
    plain, fewer = (timm.create_model("vit_small_patch16_224").eval() for _ in range(2))
    fewer.load_state_dict(plain.state_dict())
    reduce_tokens(fewer, reduction)
    images = torch.randn(16, 3, 224, 224)

    def spent(model):
        start = time.process_time()
        model(images)
        return time.process_time() - start

    spent(fewer), spent(plain)  # once unmeasured: memory is mapped
    found, before = [], spent(plain)
    for _ in range(rounds):
        own, after = spent(fewer), spent(plain)
        found.append((before + after) / (2 * own))
        before = after
    return statistics.median(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(2)
    results = []
    for name, (reduction, goal) in REDUCTIONS.items():
        value = speedup(reduction, options.rounds)
        results.append({"name": name, "value": float(f"{value:.4g}"), "goal": goal, "better": "higher"})
        verdict = "" if goal is None else f"≥ {goal}  {'ok' if value >= goal else 'MISSED'}"
        print(f"{name:32s} {value:7.4g}  {verdict}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
