"""Test the base class of the tasks: averaged weights, and the number of classes."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from tests.tasks.points import Linear, Points, points, trainer
from visionattn.errors import DataError, UsageError
from visionattn.models import Classifier
from visionattn.tasks import Classification


def test_averaged_weights_match_the_recurrence():
    """Compare Lightning's EMA of the weights with average ← 0.8 · average + 0.2 · weights after each step."""
    images, labels = points()
    task = Classification(Linear(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    weights = []  # after each step

    def append_weight(*_):
        weights.append(task.network.linear.weight.detach().clone())

    task.on_train_batch_end = append_weight
    trainer(callbacks=[EMAWeightAveraging(decay=0.8)], limit_val_batches=0).fit(task, datamodule=Points(images, labels))
    average = weights[0]
    for weight in weights[1:]:
        average = 0.8 * average + 0.2 * weight
    torch.testing.assert_close(task.network.linear.weight.detach(), average)


def test_mismatched_class_numbers_and_missing_class_counts_raise():
    images, labels = points(8)
    with pytest.raises(DataError, match="num_classes 4, and the data has 5 classes"):
        trainer().fit(Classification(Linear()), datamodule=Points(images, labels, classes=5))
    with pytest.raises(DataError, match=r"only one class, 0; if the classes are folders in 0/, give this folder"):
        trainer().fit(Classification(Linear()), datamodule=Points(images, labels, classes=1))
    with pytest.raises(DataError, match="3 weights for 4 classes"):
        trainer().fit(Classification(Linear(), class_weights=[1, 2, 3]), datamodule=Points(images, labels))
    with pytest.raises(DataError, match="needs class_counts"):
        trainer().fit(Classification(Linear(), class_weights="balanced"), datamodule=Points(images, labels))


def test_classes_in_another_order_are_matched_by_name(capsys):
    """Labels 0 to 3 of the second data have the names of the classes 3, 2, 1 and 0 of the first data."""
    images, labels = points(64)
    weighted = {"class_weights": "balanced", "optimizer": lambda p: torch.optim.SGD(p, lr=0.5)}
    torch.manual_seed(0)
    task = Classification(Linear(), **weighted)
    trainer().fit(task, datamodule=Points(images, labels, counts=[1, 2, 3, 4]))
    expected = trainer().validate(task, datamodule=Points(images, labels, counts=[1, 2, 3, 4]), verbose=False)
    assert "matched by name" not in capsys.readouterr().err
    weights = task._weight_K.clone()
    other = Points(images, 3 - labels, counts=[4, 3, 2, 1])
    other.class_names = other.class_names[::-1]
    assert trainer().validate(task, datamodule=other, verbose=False) == expected
    assert capsys.readouterr().err.count("another order; they are matched by name") == 1
    assert torch.equal(task._weight_K, weights)
    assert task.class_names == ("0", "1", "2", "3")
    other.class_names = [*other.class_names[:3], "zebra"]
    with pytest.raises(DataError, match="the data has no '0' and the model has no 'zebra'"):
        trainer().validate(task, datamodule=other, verbose=False)
    task.class_names = ()
    trainer().validate(task, datamodule=other, verbose=False)


def test_a_checkpoint_with_classes_in_another_order_is_refused_by_a_plain_trainer(tmp_path):
    images, labels = points(8)
    first = trainer()
    first.fit(Classification(Linear()), datamodule=Points(images, labels))
    first.save_checkpoint(tmp_path / "x.ckpt")
    other = Points(images, labels)
    other.class_names = other.class_names[::-1]
    options = {"datamodule": other, "ckpt_path": tmp_path / "x.ckpt", "weights_only": True, "verbose": False}
    with pytest.raises(DataError, match=r"set task\.class_names to 0, 1, 2, 3"):
        trainer().validate(Classification(Linear()), **options)
    task = Classification(Linear())
    task.class_names = tuple(reversed(other.class_names))
    trainer().validate(task, **options)
    assert task.label_numbers == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (3, 100, 100),
            "VisionTransformer wants images of 3×160×160 and got 3×100×100 .* resize them, e.g. with preproc",
        ),
        ((1, 160, 160), "got 1×160×160 .* give them 3 channels"),
    ],
)
def test_images_that_do_not_fit_the_network_are_an_error_that_names_the_size(shape, message):
    task = Classification(Classifier("test_vit", num_classes=4))
    with pytest.raises(UsageError, match=message):
        task(torch.zeros(2, *shape))
