"""Sparse self-attention in a small ViT: the runs of configs/vit, summed up in a table and a plot.

    for seed in 0 1 2; do
      visionattn fit --config configs/vit/dense.yaml --seed_everything $seed --data.seed $seed --name vit-dense-$seed
      visionattn fit --config configs/vit/dense.yaml --config configs/vit/windowed.yaml …        # and neighbourhood
      for penalty in 0.001 0.01 0.1; do
        visionattn fit --config configs/vit/dense.yaml --config configs/vit/adaptive_span.yaml … \
            --model.span_penalty $penalty --name vit-adaptive_span_$penalty-$seed
      done
      visionattn test --config runs/vit-dense-$seed/0/config.yaml --ckpt_path runs/vit-dense-$seed/0/best.ckpt \
          --model.network.tokens visionattn.attention.TokenMerging --model.network.tokens.rate 16 \
          --name vit-tome_at_test-$seed
    done
    python tests/benchmarks/vit_accuracy.py runs/vit-*-* [--json FILE] [--plot FILE]

Of each form, mean ± standard deviation over seeds: the test accuracy of the checkpoint that was best on validation
images, and the mean span of its heads in patches. Tokens a second of the forward pass, 256 images: those of dense,
over the median ratio of paired rounds, on two threads. Multiply-adds of attention and of the whole, counted from the
products that are computed.
"""

import argparse
import csv
import json
import statistics
import time
import warnings
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from visionattn.attention import TokenMerging, mean_span, reduce_tokens
from visionattn.training import load

IMAGES, SIZE = 256, 32


class Products(TorchFunctionMode):
    """Multiply-adds of attention: of every query with every key of a call, and of the weights with the values."""

    total = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.total += 2 * args[0].numel() * args[1].shape[-2]
        return func(*args, **(kwargs or {}))


def network_of(run):
    """The network of a run; of a test with fewer tokens, that of its checkpoint with them merged."""
    if (run / "best.ckpt").exists():
        return load(run / "best.ckpt").network.eval()
    config = yaml.safe_load((run / "config.yaml").read_text())
    network = load(config["ckpt_path"]).network.eval()
    tokens = config["model"]["init_args"]["network"]["init_args"]["tokens"]
    reduce_tokens(network.backbone, TokenMerging(**tokens["init_args"]))
    return network


@torch.no_grad()
def multiply_adds(network):
    """Of one image: of attention, and of the whole."""
    image = torch.zeros(1, 3, SIZE, SIZE)
    with Products() as products:
        network(image)
    with FlopCounterMode(display=False) as counter:
        network(image)
    rest = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    return products.total, products.total + rest / 2


@torch.no_grad()
def spent(network, images):
    start = time.process_time()
    network(images)
    return time.process_time() - start


def slower(network, dense, images, rounds=7):
    """Median of the time of one over that of the other right before and after it."""
    spent(network, images), spent(dense, images)
    before, found = spent(dense, images), []
    for _ in range(rounds):
        own, after = spent(network, images), spent(dense, images)
        found.append(2 * own / (before + after))
        before = after
    return statistics.median(found)


def spread(values, digits=2):
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def plot(rows, path):
    """Accuracy against multiply-adds, a mark a form with its deviation; forms of one cost beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "vit"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for number, (row, mark) in enumerate(zip(rows, "os^vDPX*ph", strict=False)):
        cost = row["compute"] / 1e6 + 0.4 * (number - len(rows) / 2)
        axes.errorbar(cost, row["accuracy"], yerr=row["std"], fmt=mark, capsize=3, label=row["name"])
    axes.set(xlabel="million multiply-adds of a forward pass", ylabel="test accuracy, %", title="CIFAR-10-JPEG")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, metadata={"Date": None})  # the same figures give the same file


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="runs/vit-FORM-SEED; the last version of each is read")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a .png")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    accuracies, spans, networks = defaultdict(list), defaultdict(list), {}
    for folder in options.runs:
        name = folder.name.removeprefix("vit-").rpartition("-")[0]
        run = max((entry for entry in folder.iterdir() if entry.name.isdigit()), key=lambda entry: int(entry.name))
        networks[name] = network = network_of(run)
        with open(run / "test.csv") as file:
            accuracies[name].append(100 * float(dict(csv.reader(file))["accuracy"]))
        if (span := mean_span(network)) is not None:
            spans[name].append(float(span))
    images, rows = torch.randn(IMAGES, 3, SIZE, SIZE), []
    patches = networks["dense"].backbone.patch_embed.num_patches
    seconds = statistics.median(spent(networks["dense"], images) for _ in range(5))
    print("| form | seeds | test accuracy, % | mean span | tokens/s | multiply-adds, of attention |")
    print("|---|---|---|---|---|---|")
    for name in sorted(accuracies, key=lambda name: (name != "dense", name)):
        factor = 1.0 if name == "dense" else slower(networks[name], networks["dense"], images)
        attended, compute = multiply_adds(networks[name])
        tests, speed = accuracies[name], IMAGES * patches / (seconds * factor)
        reach = spread(spans[name], 1) if spans[name] else ""
        counted = f"{compute / 1e6:.1f} M, {attended / 1e6:.1f} M"
        print(f"| `{name}` | {len(tests)} | {spread(tests)} | {reach} | {speed:,.0f} | {counted} |", flush=True)
        deviation = statistics.stdev(tests) if len(tests) > 1 else 0.0
        rows.append(
            {"name": name, "accuracy": statistics.mean(tests), "std": deviation, "tokens": speed, "compute": compute}
        )
    if options.json:
        table = []
        for row in rows:
            for key in ("accuracy", "tokens"):
                table.append({"name": f"{key}_{row['name']}", "value": row[key], "goal": None, "better": "higher"})
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
