"""Train detectors from scratch for a fixed CPU time; measure their mAP, their heatmaps and the speed of the mAP itself.

    python tests/benchmarks/detection.py [--json FILE] [--rows NAME ...] [--seed N] [--tune] [--device cuda]

- `dense_map50_10s`, `dense_map_50s`, `query_map50_95s`: mAP50 or mAP after the given CPU time of one thread. The
  detectors train on 512 synthetic images of 96 × 96 pixels (`tests/shapes.py`) and are scored on 500 more. The CPU
  time of the process also sets the learning rate, so other jobs on the machine change the result little. Settings were
  chosen with `--tune`, which scores on images of another seed. With `--device cuda`, this is wall time.
- `fcos_map50_10s`, `fcos_map_50s`: torchvision's FCOS on the same backbone, trained for the same time. The rows show
  how hard the images are. FCOS has one convolution per tower here, like the dense detector; its usual four are slower.
  With some seeds, FCOS finds few boxes or none. It predicts the distances to the edges through a ReLU, and at every
  learning rate from 1e-3 to 1e-2 this ReLU dies within 200 steps. All boxes then have no width or height.
- `map_eval_speed`: time of pycocotools ÷ time of the task's mAP, for 500 images with 100 boxes each; median of paired
  runs. `map_eval_difference`: the largest difference between the two in any of the twelve metrics.
- `mass_ratio_dense`, `mass_ratio_query`: (heat inside a box / all heat) ÷ (area of the box / area of the image).
  The detectors are the detectors of the rows above, trained for 50 and 95 s. All boxes count that have a score of at
  least .3 and match an object. The output also has two controls: a random map, and the map of another box. `--runs`
  measures the same ratio for runs of `visionattn fit`, on their test images:

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

from tests.benchmarks.timing import add_device, clock
from tests.shapes import NAMES, Shapes
from visionattn.evaluation.box_scores import mass_ratio
from visionattn.maps import ODAM, QuerySampling
from visionattn.models import DenseDetector, FeaturePyramid, QueryDetector, TorchvisionDetector
from visionattn.tasks.coco_metrics import compute_coco_metrics
from visionattn.training import data_from_config, load

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
    # shapes of 11 to 40 pixels need no map coarser than stride 8, and fewer maps make each step faster
    options = {"channels": (16, 32, 48, 64), "stem_width": 8}
    return FeaturePyramid("resnet10t", strides=strides, channels=channels, options=options)


def dense():
    return DenseDetector(pyramid(), len(NAMES), depth=1)


def finer():
    # with 50 s of training, a map of stride 4 is better: it locates edges more precisely, mostly of small shapes
    return DenseDetector(pyramid(32, strides=(4, 8)), len(NAMES), depth=1)


def query():
    return QueryDetector(pyramid(), len(NAMES), queries=30, layers=3, heads=4, points=4, hidden=96, depth=1, noised=40)


def fcos():
    head = FCOSHead(64, 1, len(NAMES), num_convs=1)  # the head's group normalisation needs a multiple of 32 channels
    return TorchvisionDetector(partial(FCOS, score_thresh=0.01, head=head), pyramid(64), len(NAMES))


def batches(data, size, generator, shift=0):
    """Yield augmented batches without end; see `augment`."""
    while True:
        order = torch.randperm(len(data), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            samples = [augment(data[index], generator, shift) for index in order[start : start + size]]
            images, boxes, labels = zip(*samples, strict=True)
            yield torch.stack(images), list(boxes), list(labels)


def augment(sample, generator, shift):
    """Mirror a sample with a probability of 1/2, and shift it by up to `shift` pixels unless that cuts a box.

    The image is rolled: background that leaves at one side enters at the opposite side.
    """
    image, boxes, labels = sample["image"], sample["boxes"], sample["labels"]
    height, width = image.shape[1:]
    if torch.rand((), generator=generator) < 0.5:
        image = image.flip(2)
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    if shift:
        x, y = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
        shifted = boxes + torch.tensor([x, y, x, y])
        if shifted.ge(0).all() and shifted.le(torch.tensor([width, height, width, height])).all():
            image, boxes = image.roll((y, x), (1, 2)), shifted
    return image, boxes, labels


def train(detector, data, seconds, *, lr, shift=0, batch_size=8, weight_decay=0.05, clip=1.0, warm=0.1, seed=0):
    """Train for the given CPU time, or wall time on a GPU, and return the number of steps."""
    device = next(detector.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    started, steps = clock(device), 0
    for images, boxes, labels in batches(data, batch_size, generator, shift):
        fraction = (clock(device) - started) / seconds
        if fraction >= 1:
            return steps
        cosine = 0.5 * (1 + math.cos(math.pi * (fraction - warm) / (1 - warm)))
        for group in optimizer.param_groups:
            group["lr"] = lr * (fraction / warm if fraction < warm else cosine)
        optimizer.zero_grad()
        images, boxes, labels = images.to(device), [b.to(device) for b in boxes], [n.to(device) for n in labels]
        sum(detector.train().losses(images, boxes, labels).values()).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), clip)
        optimizer.step()
        steps += 1
    return steps


@torch.no_grad()
def score(detector, data):
    detector.eval()
    device = next(detector.parameters()).device
    found, truth = [], []
    for start in range(0, len(data), 50):
        samples = [data[index] for index in range(start, min(len(data), start + 50))]
        images = torch.stack([sample["image"] for sample in samples]).to(device)
        found += [{name: value.cpu() for name, value in image.items()} for image in detector(images)]
        truth += samples
    return compute_coco_metrics(found, truth)[0]


def mass(detector, method, data, count=64):
    """Return the mean mass ratio of boxes that match an object, and a text with the ratios of the two controls."""
    own, random, other = [], [], []
    device = next(detector.parameters()).device
    count = min(count, len(data))
    for start in range(0, count, 16):
        samples = [data[index] for index in range(start, min(count, start + 16))]
        images = torch.stack([sample["image"] for sample in samples]).to(device)
        for maps, sample in zip(method(detector, images), samples, strict=True):
            found, heatmaps = maps.boxes.cpu(), maps.heatmaps.cpu()
            matched = (box_iou(found, sample["boxes"]) >= 0.5).any(1)
            heat, boxes, size = heatmaps[matched], found[matched], images.shape[2:]
            if len(boxes):
                own += mass_ratio(heat, boxes, size).tolist()
                random += mass_ratio(torch.rand(heat.shape), boxes, size).tolist()
            if len(boxes) > 1:
                other += mass_ratio(heat.roll(1, 0), boxes, size).tolist()
    if not own or not other:
        return math.nan, "  no box with a score of at least .3 matches an object"
    controls = f"random map {statistics.mean(random):.2f}, map of another box {statistics.mean(other):.2f}"
    return statistics.mean(own), f"  {len(own)} boxes; {controls}"


def run_masses(run, device):
    """Return (method, mass ratio, text about the controls) for a run's best checkpoint."""
    detector = load(run / "best.ckpt").network.to(device)
    data = data_from_config(str(run / "config.yaml"))
    data.setup("predict")
    images = data.predict_dataloader().dataset
    methods = [ODAM(), QuerySampling()] if isinstance(detector, QueryDetector) else [ODAM()]
    return [(method.name, *mass(detector, method, images)) for method in methods]


def many_boxes(images=500, boxes=100):
    random = np.random.default_rng(0)
    found, truth = [], []
    for _ in range(images):
        corner = random.uniform(0, 500, (boxes, 2))
        xyxy = np.concatenate([corner, corner + random.uniform(5, 140, (boxes, 2))], 1)
        labels = random.integers(0, 20, boxes)
        noisy = torch.tensor(xyxy + random.normal(0, 4, xyxy.shape)).float()
        found.append({"boxes": noisy, "scores": torch.rand(boxes), "labels": torch.tensor(labels)})
        truth.append({"boxes": torch.tensor(xyxy[::5]).float(), "labels": torch.tensor(labels[::5])})
    return found, truth


def by_pycocotools(found, truth):
    """Return the twelve metrics, computed as in the documentation of pycocotools."""

    def rows(images):
        for number, image in enumerate(images, start=1):
            for index, (x1, y1, x2, y2) in enumerate(image["boxes"].tolist()):
                label = int(image["labels"][index])
                box = {"image_id": number, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1]}
                yield {**box, "score": float(image["scores"][index])} if "scores" in image else box

    classes = {label for image in truth for label in image["labels"].tolist()}
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


def timed(compute, found, truth):
    """Return the CPU seconds and the twelve metrics."""
    started = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        result = compute(found, truth)
    return time.process_time() - started, result


def ours(found, truth):
    return list(compute_coco_metrics(found, truth)[0].values())


def eval_speed(rounds=3):
    found, truth = many_boxes()
    pairs = [[timed(compute, found, truth) for compute in (by_pycocotools, ours)] for _ in range(rounds)]
    ratio = statistics.median(slow / quick for (slow, _), (quick, _) in pairs)
    return ratio, max(abs(a - b) for a, b in zip(pairs[0][0][1], pairs[0][1][1], strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", nargs="*", choices=GOALS, default=list(GOALS))
    parser.add_argument("--runs", nargs="+", type=Path, default=[], help="folders of runs (default: none)")
    parser.add_argument("--seed", type=int, default=0)
    add_device(parser)
    parser.add_argument("--tune", action="store_true", help="score on the images with which settings are chosen")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    train_data, held_out = Shapes(512, seed=1), Shapes(500, seed=2 if options.tune else 3)
    results = []

    def report(name, value, note=""):
        if name not in options.rows:
            return
        goal = GOALS[name]
        results.append({"name": name, "value": round(value, 4), "goal": goal, "better": "higher"})
        verdict = "" if goal is None else f"  ≥ {goal:<4}  {'ok' if value >= goal else 'MISSED'}"
        print(f"{name:22s} {value:9.4f}{verdict}{note}", flush=True)

    def trained(make, seconds, **settings):
        torch.manual_seed(options.seed)
        detector = make().to(options.device)
        steps = train(detector, train_data, seconds, seed=options.seed, **settings)
        found = score(detector, held_out)
        return detector, found, f"  mAP {found['map']:.3f}, mAP50 {found['map_50']:.3f}, {steps} steps"

    wanted = set(options.rows)
    if "dense_map50_10s" in wanted:
        _, found, note = trained(dense, 10, lr=1e-2)
        report("dense_map50_10s", found["map_50"], note)
    if "fcos_map50_10s" in wanted:
        _, found, note = trained(fcos, 10, lr=1e-2)
        report("fcos_map50_10s", found["map_50"], note)
    if "fcos_map_50s" in wanted:
        _, found, note = trained(fcos, 50, lr=1e-2, shift=12)
        report("fcos_map_50s", found["map"], note)
    if wanted & {"dense_map_50s", "mass_ratio_dense"}:
        detector, found, note = trained(finer, 50, lr=1e-2, shift=12)
        report("dense_map_50s", found["map"], note)
        report("mass_ratio_dense", *mass(detector, ODAM(), held_out))
    if wanted & {"query_map50_95s", "mass_ratio_query"}:
        detector, found, note = trained(query, 95, lr=3e-3)
        report("query_map50_95s", found["map_50"], note)
        report("mass_ratio_query", *mass(detector, QuerySampling(), held_out))
    if wanted & {"map_eval_speed", "map_eval_difference"}:
        ratio, difference = eval_speed()
        report("map_eval_speed", ratio)
        report("map_eval_difference", difference)
    for run in options.runs:
        for method, value, note in run_masses(run, options.device):
            name = f"mass_ratio_{run.parent.name}_{method}"
            results.append({"name": name, "value": round(value, 4), "goal": 2, "better": "higher"})
            print(f"{name:40s} {value:9.4f}{note}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
