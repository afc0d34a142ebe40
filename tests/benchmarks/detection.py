"""Detectors from scratch on small data: mAP after so many CPU seconds of one thread, and what surrounds it.

    python tests/benchmarks/detection.py [--json FILE] [--rows NAME ...] [--seed N] [--tune]

- `dense_map50_10s`, `dense_map_50s`, `query_map50_95s`: trained for that time on 512 synthetic shapes of 96 px
  (`tests/shapes.py`), scored on 500 others. The time is that of the process, so that other jobs slow but do not spoil
  it; the learning rate follows it. Settings were chosen with `--tune`, which scores on images of another seed.
- `fcos_map50_10s`, `fcos_map_50s`: torchvision's FCOS on the same backbone, trained as long: a yardstick of how hard
  the images are. Its head has one convolution a tower, as the dense detector's here, where its own four are slower.
  With some seeds it finds little or nothing: the distances to the edges stand behind a ReLU, which dies within 200
  steps at any rate from 1e-3 to 1e-2, and boxes without width or height are what remains.
- `map_eval_speed`: how many times as fast as pycocotools the task's mAP is, 500 images with 100 boxes each; median of
  pairs. `map_eval_difference` is the largest difference of the twelve figures.
- `mass_ratio_dense`, `mass_ratio_query`: heat inside a box ÷ the box's share of the image, of the detectors of the rows
  above (trained for 50 and 95 s), over boxes of score .3 that found an object; beside it the controls, a random map and
  the map of another box. `--runs` does the same for runs of `visionattn fit`, on their test images:

    python tests/benchmarks/detection.py --rows --runs runs/detection-digits/0 runs/bccd-dense/0 runs/bccd-query/0
"""

import argparse
import contextlib
import io
import json
import math
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection import FCOS
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import box_iou

from tests.shapes import NAMES, Shapes
from visionattn.evaluation.box_scores import mass_ratio
from visionattn.maps.boxes import ODAM, QuerySampling
from visionattn.models import DenseDetector, FeaturePyramid, QueryDetector, TorchvisionDetector
from visionattn.tasks.coco_metrics import compute_coco_metrics
from visionattn.training import load
from visionattn.training.data_of import data_of

GOALS = {
    "dense_map50_10s": 0.93,
    "dense_map_50s": 0.85,
    "query_map50_95s": 0.90,
    "fcos_map50_10s": None,
    "fcos_map_50s": None,
    "map_eval_speed": 5,
    "map_eval_difference": None,
    "mass_ratio_dense": 2,
    "mass_ratio_query": 2,
}


def pyramid(channels=48, strides=(8,)):
    # shapes of 11 to 40 pixels need no coarser map than that of stride 8, and every step costs less
    options = {"channels": (16, 32, 48, 64), "stem_width": 8}
    return FeaturePyramid("resnet10t", strides=strides, channels=channels, options=options)


def dense():
    return DenseDetector(pyramid(), len(NAMES), depth=1)


def finer():
    # with more time a map of stride 4 pays: its edges are closer, of the small ones above all
    return DenseDetector(pyramid(32, strides=(4, 8)), len(NAMES), depth=1)


def query():
    return QueryDetector(pyramid(), len(NAMES), queries=30, layers=3, heads=4, points=4, hidden=96, depth=1, noised=40)


def fcos():
    head = FCOSHead(64, 1, len(NAMES), num_convs=1)  # whose group normalisation wants a multiple of 32 channels
    return TorchvisionDetector(partial(FCOS, score_thresh=0.01, head=head), pyramid(64), len(NAMES))


def batches(data, size, generator, shift=0):
    """Batches for ever, each image mirrored or not and moved by up to `shift` pixels."""
    while True:
        order = torch.randperm(len(data), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            some = [moved(data[n], generator, shift) for n in order[start : start + size]]
            yield torch.stack([image for image, *_ in some]), [boxes for _, boxes, _ in some], [n for *_, n in some]


def moved(sample, generator, shift):
    """A sample mirrored half of the time, and moved by up to `shift` pixels where that cuts none of its boxes.

    What leaves the image at one side comes in at the other: it is ground.
    """
    image, boxes, labels = sample["image"], sample["boxes"], sample["labels"]
    height, width = image.shape[1:]
    if torch.rand((), generator=generator) < 0.5:
        image = image.flip(2)
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    if shift:
        x, y = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
        there = boxes + torch.tensor([x, y, x, y])
        if there.ge(0).all() and there.le(torch.tensor([width, height, width, height])).all():
            image, boxes = image.roll((y, x), (1, 2)), there
    return image, boxes, labels


def train(detector, data, seconds, *, lr, shift=0, batch_size=8, weight_decay=0.05, clip=1.0, warm=0.1, seed=0):
    """Train for so many CPU seconds; returns the number of steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    started, steps = time.process_time(), 0
    for images, boxes, labels in batches(data, batch_size, generator, shift):
        gone = (time.process_time() - started) / seconds
        if gone >= 1:
            return steps
        cosine = 0.5 * (1 + math.cos(math.pi * (gone - warm) / (1 - warm)))
        for group in optimizer.param_groups:
            group["lr"] = lr * (gone / warm if gone < warm else cosine)
        optimizer.zero_grad()
        sum(detector.train().losses(images, boxes, labels).values()).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), clip)
        optimizer.step()
        steps += 1
    return steps


@torch.no_grad()
def score(detector, data):
    detector.eval()
    found, truth = [], []
    for start in range(0, len(data), 50):
        some = [data[n] for n in range(start, min(len(data), start + 50))]
        found += detector(torch.stack([sample["image"] for sample in some]))
        truth += some
    return compute_coco_metrics(found, truth)[0]


def mass(detector, method, data, count=64):
    """Mean mass ratio of the boxes that found an object, of random maps, and of the maps of other boxes."""
    own, random, other = [], [], []
    count = min(count, len(data))
    for start in range(0, count, 16):
        some = [data[n] for n in range(start, min(count, start + 16))]
        images = torch.stack([sample["image"] for sample in some])
        for maps, sample in zip(method(detector, images), some, strict=True):
            right = (box_iou(maps.boxes, sample["boxes"]) >= 0.5).any(1)
            heat, boxes, size = maps.heatmaps[right], maps.boxes[right], images.shape[2:]
            if len(boxes):
                own += mass_ratio(heat, boxes, size).tolist()
                random += mass_ratio(torch.rand(heat.shape), boxes, size).tolist()
            if len(boxes) > 1:
                other += mass_ratio(heat.roll(1, 0), boxes, size).tolist()
    if not own or not other:
        return math.nan, "  no box of score .3 found an object"
    beside = f"  {len(own)} boxes; random {statistics.mean(random):.2f}, of another box {statistics.mean(other):.2f}"
    return statistics.mean(own), beside


def run_masses(run):
    """(method, mass ratio, what to print beside it) of a run's best checkpoint."""
    detector = load(run / "best.ckpt").network
    data = data_of(str(run / "config.yaml"))
    data.setup("predict")
    images = data.predict_dataloader().dataset
    methods = [ODAM(), QuerySampling()] if isinstance(detector, QueryDetector) else [ODAM()]
    return [(method.name, *mass(detector, method, images)) for method in methods]


def many_boxes(images=500, boxes=100):
    random = np.random.default_rng(0)
    found, truth = [], []
    for _ in range(images):
        corner = random.uniform(0, 500, (boxes, 2))
        both = np.concatenate([corner, corner + random.uniform(5, 140, (boxes, 2))], 1)
        labels = random.integers(0, 20, boxes)
        near = torch.tensor(both + random.normal(0, 4, both.shape)).float()
        found.append({"boxes": near, "scores": torch.rand(boxes), "labels": torch.tensor(labels)})
        truth.append({"boxes": torch.tensor(both[::5]).float(), "labels": torch.tensor(labels[::5])})
    return found, truth


def by_pycocotools(found, truth):
    """The twelve figures, as its documentation has them made."""

    def rows(some):
        for number, one in enumerate(some, start=1):
            for place, (x1, y1, x2, y2) in enumerate(one["boxes"].tolist()):
                label = int(one["labels"][place])
                box = {"image_id": number, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1]}
                yield {**box, "score": float(one["scores"][place])} if "scores" in one else box

    classes = {label for one in truth for label in one["labels"].tolist()}
    coco = COCO()
    objects = [
        {**row, "id": number, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
        for number, row in enumerate(rows(truth), start=1)
    ]
    images = [{"id": number} for number in range(1, len(truth) + 1)]
    coco.dataset = {"images": images, "annotations": objects, "categories": [{"id": label} for label in classes]}
    coco.createIndex()
    scores = COCOeval(coco, coco.loadRes(list(rows(found))), "bbox")
    scores.evaluate()
    scores.accumulate()
    scores.summarize()
    return scores.stats.tolist()


def timed(figures, found, truth):
    """CPU seconds and the twelve figures."""
    started = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        result = figures(found, truth)
    return time.process_time() - started, result


def ours(found, truth):
    return list(compute_coco_metrics(found, truth)[0].values())


def eval_speed(rounds=3):
    found, truth = many_boxes()
    pairs = [[timed(one, found, truth) for one in (by_pycocotools, ours)] for _ in range(rounds)]
    ratio = statistics.median(slow / quick for (slow, _), (quick, _) in pairs)
    return ratio, max(abs(a - b) for a, b in zip(pairs[0][0][1], pairs[0][1][1], strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", nargs="*", choices=GOALS, default=list(GOALS))
    parser.add_argument("--runs", nargs="+", type=Path, default=[], help="folders of runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help="score on the images that settings are chosen with")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    train_data, held_out = Shapes(512, seed=1), Shapes(500, seed=2 if options.tune else 3)
    results = []

    def report(name, value, beside=""):
        if name not in options.rows:
            return
        goal = GOALS[name]
        results.append({"name": name, "value": round(value, 4), "goal": goal, "better": "higher"})
        verdict = "" if goal is None else f"  ≥ {goal:<4}  {'ok' if value >= goal else 'MISSED'}"
        print(f"{name:22s} {value:9.4f}{verdict}{beside}", flush=True)

    def trained(make, seconds, **settings):
        torch.manual_seed(options.seed)
        detector = make()
        steps = train(detector, train_data, seconds, seed=options.seed, **settings)
        found = score(detector, held_out)
        return detector, found, f"  mAP {found['map']:.3f}, mAP50 {found['map_50']:.3f}, {steps} steps"

    wanted = set(options.rows)
    if "dense_map50_10s" in wanted:
        _, found, beside = trained(dense, 10, lr=1e-2)
        report("dense_map50_10s", found["map_50"], beside)
    if "fcos_map50_10s" in wanted:
        _, found, beside = trained(fcos, 10, lr=1e-2)
        report("fcos_map50_10s", found["map_50"], beside)
    if "fcos_map_50s" in wanted:
        _, found, beside = trained(fcos, 50, lr=1e-2, shift=12)
        report("fcos_map_50s", found["map"], beside)
    if wanted & {"dense_map_50s", "mass_ratio_dense"}:
        detector, found, beside = trained(finer, 50, lr=1e-2, shift=12)
        report("dense_map_50s", found["map"], beside)
        report("mass_ratio_dense", *mass(detector, ODAM(), held_out))
    if wanted & {"query_map50_95s", "mass_ratio_query"}:
        detector, found, beside = trained(query, 95, lr=3e-3)
        report("query_map50_95s", found["map_50"], beside)
        report("mass_ratio_query", *mass(detector, QuerySampling(), held_out))
    if wanted & {"map_eval_speed", "map_eval_difference"}:
        ratio, difference = eval_speed()
        report("map_eval_speed", ratio)
        report("map_eval_difference", difference)
    for run in options.runs:
        for method, value, beside in run_masses(run):
            name = f"mass_ratio_{run.parent.name}_{method}"
            results.append({"name": name, "value": round(value, 4), "goal": 2, "better": "higher"})
            print(f"{name:40s} {value:9.4f}{beside}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
