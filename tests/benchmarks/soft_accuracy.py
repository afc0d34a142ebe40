"""Make the table of configs/soft/README.md: accuracy and cost of soft attention, from the runs of configs/soft.

    for seed in 0 1 2; do
      visionattn fit --config configs/soft/none.yaml --seed_everything $seed --data.seed $seed --name soft-none-$seed
      visionattn fit --config configs/soft/none.yaml --config configs/soft/se.yaml …        # and each other file
    done
    python tests/benchmarks/soft_accuracy.py runs/soft-*-* [--json FILE]

The accuracies are those of the checkpoint with the best validation accuracy, as mean ± standard deviation over seeds:
the test accuracy, and the accuracy on 5,000 training images without augmentation minus the test accuracy. The costs are
the parameters, the multiply-adds of one forward pass, and the CPU time of a training step ÷ that of the network without
attention. This script measures the CPU times in turns.
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
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.timing import ratio
from visionattn.data.samples import collate
from visionattn.training import data_from_config, load

TRAINING_IMAGES = 5_000


def accuracy(network, dataset):
    right = 0
    with torch.no_grad():
        for batch in DataLoader(dataset, 250, collate_fn=collate):
            right += int((network(batch["image"]).argmax(1) == batch["label"]).sum())
    return right / len(dataset)


def read_run(run):
    """Return the network of a run, the test accuracy from its test.csv, and the accuracy on training images."""
    network = load(run / "best.ckpt").network
    data = data_from_config(str(run / "config.yaml"))
    data.augment = None
    data.setup("fit")
    train = data.datasets["train"]
    step = max(1, len(train) // TRAINING_IMAGES)
    subset = Subset(train, range(0, step * min(len(train), TRAINING_IMAGES), step))
    with open(run / "test.csv") as file:
        test = float(dict(csv.reader(file))["accuracy"])
    return network, test, accuracy(network, subset)


def multiply_adds(network, size):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, *size))
    return counter.get_total_flops() / 2


def step_ratio(network, plain, size, rounds=15):
    """Return the time of a step ÷ the time of the plain network's step."""
    images, labels = torch.randn(128, 3, *size), torch.randint(0, 10, (128,))

    def step(model):
        F.cross_entropy(model(images), labels).backward()

    return ratio(partial(step, network.train()), partial(step, plain.train()), rounds)


def spread(values):
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", nargs="+", type=Path, help="folders runs/soft-MECHANISM-SEED; the newest version in each is read"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found, networks = defaultdict(list), {}
    for folder in options.runs:
        name = folder.name.removeprefix("soft-").rpartition("-")[0]
        run = max((entry for entry in folder.iterdir() if entry.name.isdigit()), key=lambda entry: int(entry.name))
        networks[name], test, train = read_run(run)
        found[name].append((test, train - test))
    size, rows = (32, 32), []
    names = sorted(found, key=lambda name: (name != "none", name))
    print("| mechanism | seeds | test accuracy, % | train − test, points | parameters | multiply-adds | step |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        tests, gaps = zip(*found[name], strict=True)
        network = networks[name]
        count = sum(parameter.numel() for parameter in network.parameters())
        slower = step_ratio(network, networks["none"], size) if name != "none" else 1.0
        millions = multiply_adds(network.eval(), size) / 1e6
        cells = name, len(tests), spread(tests), spread(gaps), f"{count:,}", f"{millions:.2f} M", f"{slower:.2f}×"
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        rows += [
            {"name": f"test_accuracy_{name}", "value": statistics.mean(tests), "goal": None, "better": "higher"},
            {"name": f"gap_{name}", "value": statistics.mean(gaps), "goal": None, "better": "lower"},
            {"name": f"step_{name}", "value": slower, "goal": None, "better": "lower"},
        ]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
