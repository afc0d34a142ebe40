"""The detection task, by hand: a detector that answers what it is told, and one that learns."""

import contextlib
import io
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import DataLoader

from tests.models.detectors import dense, query
from tests.shapes import NAMES, Shapes
from visionattn.data.pipeline import collate
from visionattn.data.placement import Placement, Preprocess
from visionattn.errors import DataError, UsageError
from visionattn.models import Detector
from visionattn.tasks import Detection
from visionattn.tasks.coco_figures import FIGURES, coco_figures
from visionattn.training.finite import FiniteLoss


class Samples(L.LightningDataModule):
    """Samples that lie in memory, as detection data gives them."""

    def __init__(self, samples, class_names=NAMES, batch_size=4):
        super().__init__()
        self.samples, self.class_names, self.batch_size = samples, class_names, batch_size

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=self.batch_size, collate_fn=collate)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def sample(number, boxes, labels, placement=None, crowd=None, area=None, image=None):
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "image": torch.zeros(3, 64, 64) if image is None else image,
        "boxes": boxes,
        "labels": torch.as_tensor(labels, dtype=torch.long),
        "crowd": torch.zeros(len(boxes), dtype=torch.bool) if crowd is None else torch.tensor(crowd),
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(1) if area is None else torch.tensor(area),
        "image_id": number,
        "path": f"{number}.png",
        "placement": placement or Placement.identity((64, 64)),
    }


def shapes(count=8, seed=0):
    return [
        sample(n, s["boxes"], s["labels"], image=s["image"]) for n, s in enumerate(Shapes(count, seed=seed, side=64))
    ]


class Oracle(Detector):
    """Answers one after the other what it was given; its loss is what it was told."""

    def __init__(self, answers=(), num_classes=4, terms=None):
        super().__init__()
        self.num_classes = num_classes
        self.answers = list(answers)
        self.terms = terms or {"one": 1.0, "two": 2.0}
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, images):
        return [self.answers.pop(0) for _ in images]

    def losses(self, images, boxes, labels):
        self.seen.append((images, boxes, labels))
        return {name: self.weight * value for name, value in self.terms.items()}


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{"enable_model_summary": False, "max_epochs": 1, "num_sanity_val_steps": 0, **quiet, **options})


def scene(random, count=40):
    """Images of many sizes with boxes, some crowds, and answers near them; in pixels of the letterboxed input."""
    samples, answers, sources = [], [], []
    for number in range(count):
        size = (int(random.integers(60, 400)), int(random.integers(60, 400)))
        _, placement = Preprocess(64, fit="letterbox")(np.zeros((*size, 3), np.uint8))
        many = int(random.integers(0, 6))
        corner = random.uniform(0, 0.6, (many, 2)) * size[::-1]
        source = np.concatenate([corner, corner + random.uniform(0.05, 0.4, (many, 2)) * size[::-1]], 1)
        labels, crowd = random.integers(0, 3, many), random.random(many) < 0.15
        area = (source[:, 2:] - source[:, :2]).prod(1) * 0.7
        samples.append(
            sample(
                number,
                placement.boxes_to_input(source),
                labels,
                placement,
                crowd.tolist(),
                area.astype(np.float32).tolist(),
            )
        )
        guesses = np.concatenate(
            [source + random.normal(0, 4, source.shape), random.uniform(0, 1, (3, 4)).cumsum(1) * 20]
        )
        found = placement.boxes_to_input(guesses)
        sides = found[:, 2:] - found[:, :2]
        found = found[(sides > 0.5).all(1)]
        names = np.where(random.random(len(found)) < 0.8, np.resize(labels if many else [0], len(found)), 1)
        answers.append(
            {
                "boxes": torch.tensor(found, dtype=torch.float32),
                "scores": torch.tensor(random.random(len(found)), dtype=torch.float32),
                "labels": torch.tensor(names),
            }
        )
        sources.append((source, labels, crowd, area, placement.boxes_to_source(found)))
    return samples, answers, sources


def test_figures_are_those_of_pycocotools_in_source_pixels():
    samples, answers, sources = scene(np.random.default_rng(0))
    truth, results = [], []
    for number, ((source, labels, crowd, area, found), answer) in enumerate(
        zip(sources, answers, strict=True), start=1
    ):
        for box, label, many, size in zip(source, labels, crowd, area, strict=True):
            xywh = [*box[:2], *(box[2:] - box[:2])]
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": number,
                    "category_id": int(label) + 1,
                    "bbox": xywh,
                    "area": size,
                    "iscrowd": int(many),
                }
            )
        for box, score, label in zip(found, answer["scores"].tolist(), answer["labels"].tolist(), strict=True):
            xywh = [*box[:2], *(box[2:] - box[:2])]
            results.append({"image_id": number, "category_id": label + 1, "bbox": xywh, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        images = [{"id": number + 1} for number in range(len(samples))]
        coco.dataset = {"images": images, "annotations": truth, "categories": [{"id": n + 1} for n in range(3)]}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    task = Detection(Oracle(answers, num_classes=3))
    (found,) = trainer().test(task, datamodule=Samples(samples, "abc"), verbose=False)
    np.testing.assert_allclose([found[f"test/{name}"] for name in FIGURES], evaluation.stats, atol=1e-5)
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    for label, name in enumerate("abc"):
        assert found[f"test/map/{name}"] == pytest.approx(precision[:, :, label].mean(), abs=1e-5)
    assert 0.1 < found["test/map"] < 0.9


def test_nothing_found_is_zero_and_nothing_there_is_not_known():
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    small = {"boxes": torch.tensor([[3.0, 4, 9, 9]]), "labels": torch.tensor([2])}
    scored = {
        name: {**some, "scores": torch.ones(len(some["labels"]))} for name, some in {"0": nothing, "1": small}.items()
    }
    figures, by_class = coco_figures([scored["0"]], [small])
    absent = {"map_medium", "map_large", "mar_medium", "mar_large"}
    assert figures == {name: -1 if name in absent else 0 for name in FIGURES}
    assert by_class == {2: 0}
    assert coco_figures([scored["1"]], [nothing]) == (dict.fromkeys(FIGURES, -1), {2: -1})
    assert coco_figures([], []) == (dict.fromkeys(FIGURES, -1), {})
    figures, by_class = coco_figures([scored["1"]], [small])
    assert figures == {name: pytest.approx(-1 if name in absent else 1) for name in FIGURES}
    assert by_class == {2: pytest.approx(1)}


def test_what_is_found_in_the_padding_alone_is_left_out():
    """Of an image 20 pixels high in an input of 64 × 64, the rows 22 to 42 are its own."""
    _, placement = Preprocess(64, fit="letterbox")(np.zeros((40, 128, 3), np.uint8))
    boxes = torch.tensor([[3.0, 2, 30, 20], [3, 10, 30, 30], [3, 22, 30, 42], [3, 41.8, 30, 60]])
    answer = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]), "labels": torch.tensor([0, 1, 2, 3])}
    task = Detection(Oracle([answer]))
    ((predicted,),) = [trainer().predict(task, datamodule=Samples([sample(0, [], [], placement)]))]
    (found,) = predicted["detections"]
    assert found["labels"].tolist() == [1, 2]
    torch.testing.assert_close(found["scores"], torch.tensor([0.8, 0.7]))
    torch.testing.assert_close(found["boxes"], torch.tensor([[6.0, 0, 60, 16], [6, 0, 60, 40]]))


def test_terms_are_logged_apart_and_crowds_are_not_trained_on():
    samples = [sample(0, [[0, 0, 9, 9], [5, 5, 20, 30]], [1, 2], crowd=[False, True]), sample(1, [], [])]
    oracle = Oracle()
    task = Detection(oracle)
    logged = {}
    task.log = lambda name, value, **_: logged.update({name: float(value.detach())})
    trainer(limit_val_batches=0).fit(task, datamodule=Samples(samples))
    assert logged == {"train/loss": 3, "train/loss_one": 1, "train/loss_two": 2}
    ((_, boxes, labels),) = oracle.seen
    assert [some.tolist() for some in boxes] == [[[0, 0, 9, 9]], []]
    assert [some.tolist() for some in labels] == [[1], []]


def test_a_loss_that_is_not_finite_ends_the_training_and_names_the_images():
    """And the term, which the task logs apart."""
    task = Detection(Oracle(terms={"good": 1.0, "box": float("nan")}))
    data = Samples([sample(0, [], []), sample(1, [], [])])
    with pytest.raises(DataError, match=r"step 0 .* is nan \(train/loss_box nan\); its images: 0\.png, 1\.png;"):
        trainer(limit_val_batches=0, callbacks=[FiniteLoss()]).fit(task, datamodule=data)


def test_or_its_step_is_left_out():
    oracle = Oracle(terms={"box": float("nan")})
    skip = FiniteLoss(otherwise="skip")
    trainer(limit_val_batches=0, callbacks=[skip]).fit(Detection(oracle), datamodule=Samples([sample(0, [], [])]))
    assert skip.skipped == 1
    assert oracle.weight.item() == 1


def test_training_sizes_are_drawn_and_boxes_follow():
    image = torch.zeros(3, 64, 48)
    image[:, 16:32, 12:36] = 1
    samples = [sample(number, [[12, 16, 36, 32]], [0], image=image) for number in range(12)]

    def seen():
        oracle = Oracle()
        data = Samples(samples, batch_size=1)
        trainer(limit_val_batches=0).fit(Detection(oracle, sizes=[32, 64, 96]), datamodule=data)
        return oracle.seen

    sizes = set()
    for images, (boxes,), _ in seen():
        sizes.add(tuple(images.shape[2:]))
        x1, y1, x2, y2 = boxes[0].round().int().tolist()
        assert images[0, 0, y1:y2, x1:x2].mean() > 0.95
        assert images.sum() / 3 == pytest.approx((x2 - x1) * (y2 - y1), rel=0.05)
    assert sizes == {(32, 32), (64, 48), (96, 72)}  # no side below 32
    assert [images.shape for images, *_ in seen()] == [images.shape for images, *_ in seen()]


def test_classes_that_differ_from_the_data_are_named():
    with pytest.raises(DataError, match=r"num_classes 7, and the data has 4 classes \(disc, .*num_classes: 4"):
        trainer().fit(Detection(Oracle(num_classes=7)), datamodule=Samples([sample(0, [], [])]))


def test_it_trains_clips_averages_and_predicts():
    torch.manual_seed(0)
    task = Detection(dense(), optimizer=partial(torch.optim.SGD, lr=0.01))
    data = Samples(shapes())
    before = {name: value.clone() for name, value in task.network.state_dict().items()}
    average = EMAWeightAveraging(decay=0.5)
    trainer(max_epochs=2, gradient_clip_val=0.1, callbacks=[average]).fit(task, datamodule=data)
    assert any(not torch.equal(value, before[name]) for name, value in task.network.state_dict().items())
    (predicted, *_) = trainer().predict(task, datamodule=data)
    assert predicted["image_id"] == [0, 1, 2, 3]
    assert len(predicted["detections"]) == 4


@pytest.mark.parametrize("make", [dense, query])
def test_it_trains_and_scores_in_mixed_precision(make):
    torch.manual_seed(0)
    task = Detection(make(), optimizer=partial(torch.optim.AdamW, lr=1e-3))
    runs = trainer(precision="bf16-mixed", gradient_clip_val=1.0, callbacks=[FiniteLoss()])
    runs.fit(task, datamodule=Samples(shapes()))
    assert -1 <= runs.callback_metrics["val/map"] <= 1
    fused = Detection(dense(), optimizer=partial(torch.optim.AdamW, fused=True))
    with pytest.raises(UsageError, match="fused optimizer cannot be clipped in bf16-mixed; set fused: false"):
        trainer(precision="bf16-mixed", gradient_clip_val=1.0).fit(fused, datamodule=Samples(shapes()))


def test_nothing_anywhere_has_figures_too():
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}
    task = Detection(Oracle([empty, empty]))
    (found,) = trainer().test(task, datamodule=Samples([sample(0, [], []), sample(1, [], [])]), verbose=False)
    assert found["test/map"] == -1
