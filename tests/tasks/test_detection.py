"""Test the detection task with a detector of given predictions, and with one that is trained."""

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


def shapes(count=8, seed=0):
    return [
        sample(n, s["boxes"], s["labels"], image=s["image"]) for n, s in enumerate(Shapes(count, seed=seed, side=64))
    ]


def test_boxes_in_the_padding_are_left_out():
    """An image 20 pixels high fills the rows 22 to 42 of an input of 64 × 64."""
    _, placement = Preprocess(64, fit="letterbox")(np.zeros((40, 128, 3), np.uint8))
    boxes = torch.tensor([[3.0, 2, 30, 20], [3, 10, 30, 30], [3, 22, 30, 42], [3, 41.8, 30, 60]])
    answer = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]), "labels": torch.tensor([0, 1, 2, 3])}
    task = Detection(Oracle([answer]))
    ((predicted,),) = [trainer().predict(task, datamodule=Samples([sample(0, [], [], placement)]))]
    (found,) = predicted["detections"]
    assert found["labels"].tolist() == [1, 2]
    torch.testing.assert_close(found["scores"], torch.tensor([0.8, 0.7]))
    torch.testing.assert_close(found["boxes"], torch.tensor([[6.0, 0, 60, 16], [6, 0, 60, 40]]))


def test_loss_terms_are_logged_and_crowds_are_not_trained_on():
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


def test_training_sizes_are_drawn_and_boxes_are_scaled():
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


def test_wrong_number_of_classes_raises():
    with pytest.raises(DataError, match=r"num_classes 7, and the data has 4 classes \(disc, .*num_classes: 4"):
        trainer().fit(Detection(Oracle(num_classes=7)), datamodule=Samples([sample(0, [], [])]))


def test_detection_trains_with_clipping_and_averaging_and_predicts():
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
def test_detection_trains_and_scores_in_mixed_precision(make):
    torch.manual_seed(0)
    task = Detection(make(), optimizer=partial(torch.optim.AdamW, lr=1e-3))
    runs = trainer(precision="bf16-mixed", gradient_clip_val=1.0, callbacks=[NaNGuard()])
    runs.fit(task, datamodule=Samples(shapes()))
    assert -1 <= runs.callback_metrics["val/map"] <= 1
    fused = Detection(dense(), optimizer=partial(torch.optim.AdamW, fused=True))
    with pytest.raises(UsageError, match="fused optimizer cannot be clipped in bf16-mixed; set fused: false"):
        trainer(precision="bf16-mixed", gradient_clip_val=1.0).fit(fused, datamodule=Samples(shapes()))
