"""Which metric of a heatmap can be believed, and which method? Planted evidence tells.

    python tests/benchmarks/judge.py [--full] [--json FILE] [--plot FILE] [--networks NAME ...] [--weights FOLDER]
    python tests/benchmarks/judge.py --rows FILE ... [--plot FILE]        # the summary of earlier runs

Four small networks classify images whose evidence is known (`planted.py`). Every method that fits is scored by
`evaluation.score` on images that the network classifies correctly: half have one mark, half have two marks that only
count together. Pointing, energy and IoU with the planted marks are the truth; deletion, insertion, ROAD and SaCo do not
see the marks. The rank correlation of each of these with the mean of the three, over methods and controls, says how far
it can be believed.

`NAME@LAYER` is a method at the layer with the most energy on the marks of other images than those that are reported.
The networks are trained in the first run, in about 5 minutes of one core, and kept in `runs/judge`. Unless it is named,
a fifth network, `vit_mean`, is left out. The quick form has 60 images, the full one 300. All intervals are 95 %
intervals of the bootstrap over images.
"""

import argparse
import inspect
import json
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from PIL import Image

from tests.benchmarks.planted import GOAL, NETWORKS, Planted, accuracy, to_input, trained
from visionattn.capture import survey_images
from visionattn.errors import DataError, UsageError
from visionattn.evaluation import METRICS, score
from visionattn.evaluation.localisation import energy
from visionattn.maps import METHODS, at_layer, default_method

TRUTH = ("pointing", "energy", "iou")
JUDGED = ("deletion", "insertion", "road", "saco")
KINDS = (("horizontal",), ("horizontal", "vertical"), ("vertical",), ("horizontal", "vertical"))
TUNING, STEPS, BATCH = 24, 16, 30
LAYERS = {
    "gates": ["blocks.0", "blocks.1", "blocks.2", "blocks.3"],
    "densenet": ["features.pool0", "features.denseblock1", "features.transition1", "features.denseblock2"],
    "vit": [f"blocks.{number}" for number in range(6)],
    "vit_mean": [f"blocks.{number}" for number in range(6)],
    "swin": ["features.1.0", "features.1.1", "features.3.0", "features.3.1"],
}
"""Layers to choose from, for methods that take the name of a layer."""


def images_of(network, split, count):
    """Return batches of images that the network classifies correctly, as `evaluation.score` takes them."""
    data, chosen, number = Planted(split, 1_000), [], 0
    while len(chosen) < count:
        kinds = KINDS[len(chosen) % len(KINDS)]
        image, label, evidence = data.draw(number, seed=3, kinds=kinds)
        number += 1
        with torch.no_grad():
            if int(network(to_input([image])).argmax()) == label:
                chosen.append((image, label, torch.from_numpy(evidence)))
    return [
        {
            "image": to_input([image for image, *_ in part]),
            "label": torch.tensor([label for _, label, _ in part]),
            "mask": torch.stack([evidence.any(0) for *_, evidence in part]),
            "marks": [evidence for *_, evidence in part],
        }
        for part in (chosen[start : start + BATCH] for start in range(0, count, BATCH))
    ]


LEFT_OUT = ("rise",)
"""Methods that are not judged, since they take 1,001 forward passes for each image."""


def methods_for(name, network, tuning, log):
    """Return the methods to compare: all that fit, at the default layer and at the layer that is best on `tuning`."""
    images = tuning[0]["image"]
    survey, default = survey_images(network, images[:1]), type(default_method(network, images))
    fitting = {key: kind for key, kind in METHODS.items() if kind.fits(survey) and key not in LEFT_OUT}
    methods = {key: kind() for key, kind in fitting.items()}
    for key, kind in fitting.items():
        parameters = inspect.signature(kind).parameters
        if "layer" not in parameters or kind.cost == "a forward pass a channel":
            continue
        by_index = "int" in str(parameters["layer"].annotation)
        layers = [str(index) for index in range(len(survey.attention))] if by_index else LAYERS[name]
        found = {layer: share for layer in layers if (share := energy_of(at_layer(kind, layer), network, tuning))}
        best = max(found, key=lambda layer: found[layer], default=None)
        log(f"  {key}: " + ", ".join(f"{layer} {share:.3f}" for layer, share in found.items()))
        if best is not None and found[best] > energy_of(methods[key], network, tuning) + 1e-6:
            methods[f"{key}@{best}"] = at_layer(kind, best)
    log(f"  default: {default.name}")
    return methods


def energy_of(method, network, batches):
    """Return the mean energy of a method on the marks; None if the method cannot explain the network."""
    try:
        shares = [
            energy(method(network, batch["image"], target=batch["label"]).heatmaps, batch["mask"]) for batch in batches
        ]
    except (UsageError, DataError):
        return None
    return float(torch.cat(shares).mean())


# Figures -----------------------------------------------------------------------------------------------------------


def ranks(values_RM):
    """Return the ranks of M values in each of R rows; equal values share their mean rank."""
    below = (values_RM[:, :, None] > values_RM[:, None, :]).sum(2)
    equal = (values_RM[:, :, None] == values_RM[:, None, :]).sum(2)
    return below + (equal - 1) / 2


def correlation(a_RM, b_RM):
    """Return Spearman's rank correlation of each row, (R,)."""
    a_RM, b_RM = (ranks(values) - (values.shape[1] - 1) / 2 for values in (a_RM, b_RM))
    return (a_RM * b_RM).sum(1) / np.sqrt((a_RM**2).sum(1) * (b_RM**2).sum(1))


def means(scores, metric):
    """Return the mean of each method and control over the images and over each resample, (1 + R, M)."""
    return np.stack([scores._means(name, metric) for name in scores.values], 1)


def judged(scores):
    """Return metric → rank correlation with the truth and its interval, where more is better for all."""
    truth_RM = np.mean([means(scores, metric) for metric in TRUTH], 0)
    found = {}
    for metric in (*TRUTH, *JUDGED):
        values_R = correlation(METRICS[metric] * means(scores, metric), truth_RM)
        low, high = np.percentile(values_R[1:], [2.5, 97.5])
        found[metric] = float(values_R[0]), float(low), float(high)
    return found


def of_kind(scores, batches, method, together):
    """Return the mean energy of a method over the images with one mark, or with two marks."""
    kinds = np.array([len(marks) == 2 for batch in batches for marks in batch["marks"]])
    return float(scores.of_images(method, "energy")[kinds == together].mean())


def row(name, value, low, high, better, goal=None):
    numbers = {key: round(float(number), 4) for key, number in (("value", value), ("low", low), ("high", high))}
    return {"name": name, "value": numbers["value"], "goal": goal, "better": better} | numbers


def judge(name, network, images, log=print):
    """Score all methods on one network; return the scores, the batches and the rows for --json."""
    tuning, batches = images_of(network, "val", TUNING), images_of(network, "test", images)
    methods = methods_for(name, network, tuning, log)
    start = time.process_time()
    scores = score(network, batches, methods, metrics=(*TRUTH, *JUDGED), steps=STEPS, batch_size=64)
    log(f"{name}: {len(scores.controls)} methods, {images} images, {time.process_time() - start:.0f} s of CPU time")
    for failed, reason in scores.failed.items():
        log(f"  {failed} is left out: {reason}")
    rows = []
    for method in scores.values:
        for metric in scores.metrics:
            better = "higher" if METRICS[metric] > 0 else "lower"
            about = {"network": name, "method": method, "metric": metric, "against_controls": None}
            if method in scores.controls:
                about["against_controls"] = {" ": "beats", "=": "ties", "✗": "loses"}[scores.sign(method, metric)]
            rows.append(row(f"{metric}_{method}_{name}", *scores.estimate(method, metric), better) | about)
    for metric, found in judged(scores).items():
        rows.append(
            row(f"correlation_{metric}_{name}", *found, "higher") | {"network": name, "method": None, "metric": metric}
        )
    return scores, batches, rows


# Tables and plot ---------------------------------------------------------------------------------------------------


def print_network(name, scores, batches):
    """Print the table of a network: methods by their energy, then the controls."""
    print(f"\n{name}\n\n| method | energy: one mark | two marks | " + " | ".join(scores.metrics) + " |")
    print("|" + "---|" * (3 + len(scores.metrics)))
    order = sorted(scores.values, key=lambda key: (key not in scores.controls, -scores.estimate(key, "energy").value))
    for key in order:
        kinds = [f"{of_kind(scores, batches, key, together):.2f}".removeprefix("0") for together in (False, True)]
        print(f"| `{key}` | {' | '.join(kinds)} | {' | '.join(cell.strip() for cell in scores.cells(key))} |")
    print()
    for line in scores.verdicts():
        print(line)


def print_summary(rows):
    """Print the two tables of evaluation/README.md: energy of each method, and correlation of each metric."""
    scored = [row for row in rows if "network" in row]
    networks = list(dict.fromkeys(row["network"] for row in scored))
    found = {(row["method"], row["metric"], row["network"]): row for row in scored}
    methods = list(dict.fromkeys(row["method"] for row in scored if row.get("against_controls")))
    head = "".join(f" | `{name}`" for name in networks) + " |\n" + "|---" * (1 + len(networks)) + "|"
    print(f"\n| method{head}")
    for method in [method for method in methods if "@" not in method]:
        cells = []
        for network in networks:
            cell = found.get((method, "energy", network))
            text = with_sign(cell) if cell else ""
            for name in methods:
                tuned = found.get((name, "energy", network))
                if tuned and name.startswith(f"{method}@"):
                    text += f"; {with_sign(tuned)} at `{name.partition('@')[2]}`"
            cells.append(text)
        print(f"| `{method}` | {' | '.join(cells)} |")
    print(f"\n| metric{head}")
    for metric in JUDGED:
        cells = [found[None, metric, network] for network in networks]
        print(
            f"| `{metric}` | " + " | ".join("{value:.2f} ({low:.2f} to {high:.2f})".format(**c) for c in cells) + " |"
        )


def with_sign(row):
    """Return a figure with half its interval, and = or ✗ if it ties with or loses to a control."""
    sign = {"beats": "", "ties": "=", "loses": "✗"}[row["against_controls"]]
    return f"{short(row['value'])}±{short((row['high'] - row['low']) / 2)}{sign}"


def short(number):
    return f"{number:.2f}".removeprefix("0")


def plot(rows, path):
    """Draw the energy of every method and control with its interval, a panel for each network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row.get("metric") == "energy" and row["method"]]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, panels = plt.subplots(1, len(networks), figsize=(13, 6), layout="constrained", squeeze=False)
    for axes, network in zip(panels[0], networks, strict=True):
        shown = sorted((row for row in rows if row["network"] == network), key=lambda row: row["value"])
        for height, row in enumerate(shown):
            error = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
            colour = {"beats": "#1f6fb4", "ties": "#888888", "loses": "#c23b22", None: "#000000"}[
                row["against_controls"]
            ]
            mark = "o" if row["against_controls"] else "x"
            axes.errorbar(row["value"], height, xerr=error, fmt=mark, ms=4, color=colour, capsize=2)
        axes.set_yticks(range(len(shown)), [row["method"] for row in shown], fontsize=7)
        axes.set(title=network, xlim=(0, 0.85), xlabel="heat on the planted marks")
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle("blue: beats every control; grey: ties with one; red: loses to one; black crosses: controls")
    figure.savefig(path, dpi=70, metadata={"Software": None})
    if path.suffix == ".png":
        with Image.open(path) as picture:
            small = picture.convert("RGB").quantize(64)  # a quarter of the size
        small.save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="300 images instead of 60")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="path of the plot, .png or .svg (default: no plot)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS)[:4])
    parser.add_argument("--weights", type=Path, default=Path("runs/judge"), help="folder of the trained networks")
    parser.add_argument("--images", type=int, help="number of images (default: 60, or 300 with --full)")
    parser.add_argument("--rows", nargs="+", type=Path, help="files of --json, whose summary is printed and drawn")
    options = parser.parse_args()
    if options.rows:
        rows = [row for path in options.rows for row in json.loads(path.read_text())]
        print_summary(rows)
        if options.plot:
            plot(rows, options.plot)
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    images = options.images or (300 if options.full else 60)
    rows = []
    pictures, labels = Planted("test", 1_000).batch(range(1_000), seed=1)
    for name in options.networks:
        network = trained(name, options.weights)
        right = accuracy(network, pictures, labels)
        print(f"{name}: test accuracy {right:.3f} of 1,000 images", flush=True)
        rows.append({"name": f"accuracy_{name}", "value": round(right, 4), "goal": GOAL, "better": "higher"})
        scores, batches, more = judge(name, network, images, log=lambda line: print(line, flush=True))
        print_network(name, scores, batches)
        rows += more
        if options.json:  # after each network, so that a killed run leaves its figures
            options.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    print_summary(rows)
    if options.plot:
        plot(rows, options.plot)
    print(f"{time.process_time():.0f} s of CPU time")


if __name__ == "__main__":
    main()
