"""Test the detection task with a detector that returns given predictions, and with trained detectors."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from tests.models.detectors.small import dense, query
from tests.shapes import Shapes
from tests.tasks.oracle import Oracle, Samples, sample, trainer
from visionattn.data.placement import Preprocess
from visionattn.errors import DataError, UsageError
from visionattn.tasks import Detection
from visionattn.training.callbacks.nan_guard import NaNGuard


def shape_samples(count=8, seed=0):
    """Make samples of drawn shapes with their boxes."""
    return [
        sample(n, s["boxes"], s["labels"], image=s["image"]) for n, s in enumerate(Shapes(count, seed=seed, side=64))
    ]


def test_boxes_in_the_padding_are_left_out():
    """A source image of 40 × 128 pixels covers rows 22 to 42 of the 64 × 64 input."""
    _, placement = Preprocess(64, fit="letterbox")(np.zeros((40, 128, 3), np.uint8))
    boxes = torch.tensor([[3.0, 2, 30, 20], [3, 10, 30, 30], [3, 22, 30, 42], [3, 41.8, 30, 60]])
    prediction = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]), "labels": torch.tensor([0, 1, 2, 3])}
    task = Detection(Oracle([prediction]))
    ((result,),) = [trainer().predict(task, datamodule=Samples([sample(0, [], [], placement)]))]
    (found,) = result["detections"]
    assert found["labels"].tolist() == [1, 2]
    torch.testing.assert_close(found["scores"], torch.tensor([0.8, 0.7]))
    torch.testing.assert_close(found["boxes"], torch.tensor([[6.0, 0, 60, 16], [6, 0, 60, 40]]))


def test_loss_terms_are_logged_and_training_ignores_crowds():
    samples = [sample(0, [[0, 0, 9, 9], [5, 5, 20, 30]], [1, 2], crowd=[False, True]), sample(1, [], [])]
    oracle = Oracle()
    task = Detection(oracle)
    logged = {}
    task.log = lambda name, value, **_: logged.update({name: float(value.detach())})
    trainer(limit_val_batches=0).fit(task, datamodule=Samples(samples))
    assert logged == {"train/loss": 3, "train/loss_one": 1, "train/loss_two": 2}
    ((_, boxes, labels),) = oracle.loss_calls
    assert [boxes_N4.tolist() for boxes_N4 in boxes] == [[[0, 0, 9, 9]], []]
    assert [labels_N.tolist() for labels_N in labels] == [[1], []]


def test_training_sizes_vary_reproducibly_and_boxes_are_scaled():
    image = torch.zeros(3, 64, 48)
    image[:, 16:32, 12:36] = 1  # white inside the box
    samples = [sample(number, [[12, 16, 36, 32]], [0], image=image) for number in range(12)]

    def training_batches():
        oracle = Oracle()
        data = Samples(samples, batch_size=1)
        trainer(limit_val_batches=0).fit(Detection(oracle, sizes=[32, 64, 96]), datamodule=data)
        return oracle.loss_calls

    sizes = set()
    for images, (boxes,), _ in training_batches():
        sizes.add(tuple(images.shape[2:]))
        x1, y1, x2, y2 = boxes[0].round().int().tolist()
        assert images[0, 0, y1:y2, x1:x2].mean() > 0.95
        assert images.sum() / 3 == pytest.approx((x2 - x1) * (y2 - y1), rel=0.05)
    assert sizes == {(32, 32), (64, 48), (96, 72)}  # no side is below 32
    # a second training draws the same sizes
    first, second = ([images.shape for images, *_ in training_batches()] for _ in range(2))
    assert first == second


def test_wrong_number_of_classes_raises():
    with pytest.raises(DataError, match=r"num_classes 7, and the data has 4 classes \(disc, .*num_classes: 4"):
        trainer().fit(Detection(Oracle(num_classes=7)), datamodule=Samples([sample(0, [], [])]))


def test_detection_trains_with_clipping_and_averaging_and_predicts():
    torch.manual_seed(0)
    task = Detection(dense(), optimizer=partial(torch.optim.SGD, lr=0.01))
    data = Samples(shape_samples())
    before = {name: value.clone() for name, value in task.network.state_dict().items()}
    average = EMAWeightAveraging(decay=0.5)
    trainer(max_epochs=2, gradient_clip_val=0.1, callbacks=[average]).fit(task, datamodule=data)
    assert any(not torch.equal(value, before[name]) for name, value in task.network.state_dict().items())
    (first_batch, *_) = trainer().predict(task, datamodule=data)
    assert first_batch["image_id"] == [0, 1, 2, 3]
    assert len(first_batch["detections"]) == 4


@pytest.mark.parametrize("make", [dense, query])
def test_detection_trains_in_mixed_precision_but_rejects_fused_clipping(make):
    torch.manual_seed(0)
    task = Detection(make(), optimizer=partial(torch.optim.AdamW, lr=1e-3))
    run = trainer(precision="bf16-mixed", gradient_clip_val=1.0, callbacks=[NaNGuard()])
    run.fit(task, datamodule=Samples(shape_samples()))
    assert -1 <= run.callback_metrics["val/map"] <= 1
    fused = Detection(dense(), optimizer=partial(torch.optim.AdamW, fused=True))
    with pytest.raises(UsageError, match="fused optimizer cannot be clipped in bf16-mixed; set fused: false"):
        trainer(precision="bf16-mixed", gradient_clip_val=1.0).fit(fused, datamodule=Samples(shape_samples()))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_precision_that_converts_the_boxes_too_is_refused(precision):
    with pytest.raises(UsageError, match=f"cannot run with trainer.precision {precision}"):
        trainer(precision=precision).fit(Detection(Oracle()), datamodule=Samples([sample(0, [], [])]))
