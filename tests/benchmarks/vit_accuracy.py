"""Make the table and plot of configs/vit/README.md: sparse self-attention in a small ViT, from the runs of configs/vit.

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

The test accuracy (of the checkpoint with the best validation accuracy) and the mean span of the heads in patches are
mean ± standard deviation over seeds. Tokens per second are measured for dense attention, on 256
images and two threads; for another form, they are divided by the median of its time ÷ the time of dense attention, of
passes that alternate. The multiply-adds of attention and
of the whole network are counted from the products that are computed.
"""

import argparse
import csv
import json
import statistics
import sys
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
import yaml
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.timing import ratio, spent
from visionattn.attention import TokenMerging, mean_span, reduce_tokens
from visionattn.training import load

IMAGES, SIZE = 256, 32


class Products(TorchFunctionMode):
    """Count the multiply-adds of attention: queries times keys, and weights times values, of every fused call."""

    total = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.total += 2 * args[0].numel() * args[1].shape[-2]
        return func(*args, **(kwargs or {}))


def network_of(run):
    """Return the network of a run. For a test with token merging, load the tested checkpoint and merge its tokens."""
    if (run / "best.ckpt").exists():
        return load(run / "best.ckpt").network.eval()
    config = yaml.safe_load((run / "config.yaml").read_text())
    network = load(config["ckpt_path"]).network.eval()
    tokens = config["model"]["init_args"]["network"]["init_args"]["tokens"]
    reduce_tokens(network.backbone, TokenMerging(**tokens["init_args"]))
    return network


@torch.no_grad()
def multiply_adds(network):
    """Return the multiply-adds for one image: of attention, and of the whole network."""
    image = torch.zeros(1, 3, SIZE, SIZE)
    with Products() as products:
        network(image)
    with FlopCounterMode(display=False) as counter:
        network(image)
    rest = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    return products.total, products.total + rest / 2


@torch.no_grad()
def run(network, images):
    network(images)


def spread(values, digits=2):
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def plot(rows, path):
    """Plot accuracy over multiply-adds with error bars. Forms of equal cost are drawn side by side."""
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
    figure.savefig(path, metadata={"Date": None})  # without a date, the same numbers give the same file


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", nargs="+", type=Path, help="folders runs/vit-FORM-SEED; the newest version in each is read"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="path of the plot, .svg or .png (default: no plot)")
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
    seconds = statistics.median(spent(partial(run, networks["dense"], images), 1) for _ in range(5))
    print("| form | seeds | test accuracy, % | mean span | tokens/s | multiply-adds (attention's share) |")
    print("|---|---|---|---|---|---|")
    for name in sorted(accuracies, key=lambda name: (name != "dense", name)):
        factor = 1.0 if name == "dense" else ratio(*(partial(run, networks[key], images) for key in (name, "dense")), 7)
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
