"""Test the pictures and metrics of a glimpse network's fixations."""

import csv
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from tests.data.synthetic.handwriting import FakeMNIST
from visionattn.attention import Gaussian, Retina
from visionattn.data import DigitsOnCanvasData, read_image
from visionattn.drawing import draw_scanpath
from visionattn.drawing.boxes import draw_box
from visionattn.drawing.overlay import blend, heat
from visionattn.maps import Gaze
from visionattn.maps.method import Heatmaps
from visionattn.models import GlimpseNetwork, MLPEncoder
from visionattn.tasks import GlimpseClassification
from visionattn.tasks.glimpses import on_object
from visionattn.training import OverlaySamples, TestReport
from visionattn.training.callbacks.scanpath_report import FixationDensity


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train a glimpse network for an epoch and test it; return the run's folder, the task and the data."""
    home = tmp_path_factory.mktemp("gaze")
    torch.manual_seed(0)
    options = {"policy": Gaussian, "encoder": MLPEncoder, "num_glimpses": 3, "hidden_size": 16, "in_chans": 1}
    network = GlimpseNetwork(10, retina=Retina(6, scales=2), **options)
    with torch.no_grad():
        network.policy.layers[-1].weight.mul_(300)  # so that the locations differ between images
    task = GlimpseClassification(network)
    data = DigitsOnCanvasData(str(home), dataset=FakeMNIST, canvas=40, val_size=100, batch_size=64)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(home, version="0"),
        callbacks=[OverlaySamples(num_images=3), TestReport(num_images=4)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(task, data)
    trainer.test(task, data, verbose=False)
    return trainer.log_dir, task.eval(), data


def test_sheets_show_scanpath_box_and_heatmap_of_each_image(run):
    folder, task, data = run
    sample = data.dataset("test")[0]
    source = data.dataset("test").read_source(sample["path"])
    maps = Gaze()(task.network, sample["image"][None])
    path = draw_box(draw_scanpath(source, maps.boxes[0].numpy(), side=240), 6 * sample["box"], thickness=2)
    overlay = blend(source, maps.heatmaps[0].numpy()).repeat(6, 0).repeat(6, 1)
    picture = read_image(f"{folder}/overlays/test.png")
    np.testing.assert_array_equal(picture[46 : 46 + 240, 16 : 16 + 240], path)
    overlay = draw_box(overlay, 6 * sample["box"], thickness=2)
    np.testing.assert_array_equal(picture[46 : 46 + 240, 272 : 272 + 240], overlay)
    assert read_image(f"{folder}/overlays/epoch_000.jpg").shape[1] == picture.shape[1]


def test_density_picture_shows_the_means_over_all_test_images(run):
    folder, task, data = run
    dataset = data.dataset("test")
    first, later, boxes = (np.zeros((40, 40)) for _ in range(3))
    for index in range(len(dataset)):
        sample = dataset[index]
        with torch.no_grad():
            location = task.network.rollout(sample["image"][None], locations="mean").location[0, 0]
        finest_boxes = task.network.retina.boxes(location, (40, 40))[:, 0].int().clamp(0, 40).tolist()
        for glimpse, (left, top, right, bottom) in enumerate(finest_boxes):
            (later if glimpse else first)[top:bottom, left:right] += 1 / len(dataset)
        left, top, right, bottom = sample["box"].int().tolist()
        boxes[top:bottom, left:right] += 1 / len(dataset)
    picture = read_image(f"{folder}/overlays/gaze_density.png")
    for column, mean in enumerate((first, later, boxes)):
        expected = heat(mean / mean.max()).repeat(7, 0).repeat(7, 1)
        left = 16 + column * (300 + 16) + 10
        np.testing.assert_allclose(picture[46 : 46 + 280, left : left + 280].astype(int), expected, atol=3)


def test_animation_has_one_frame_per_glimpse(run):
    folder, _, _ = run
    with Image.open(f"{folder}/overlays/gaze.webp") as image:
        assert image.n_frames == 3


def test_report_has_the_fraction_of_fixations_on_the_object(run):
    folder, task, data = run
    with open(f"{folder}/test.csv", newline="") as file:
        metrics = {row["figure"]: float(row["value"]) for row in csv.DictReader(file)}
    batch = data.dataset("test").__getitems__(list(range(len(data.dataset("test")))))
    with torch.no_grad():
        rollout = task.network.rollout(batch["image"], locations="mean")
    assert 0.02 < metrics["fixations_on_object"] < 0.98
    assert metrics["fixations_on_object"] == pytest.approx(
        float(on_object(rollout, batch["box"], (40, 40)).mean()), abs=1e-4
    )
    # ±1 are the centres of the outermost pixels, so random locations are uniform on a square with side 39 pixels;
    # a box of w × h pixels contains about w · h / 39² of these locations
    areas = (batch["box"][:, 2:] - batch["box"][:, :2]).prod(1).mean() / 39**2
    assert metrics["fixations_random"] == pytest.approx(float(areas), abs=0.05)
    assert {"pointing", "pointing_centre_guess", "pointing_chance"} <= metrics.keys()


def test_density_is_a_mean_over_images_and_not_over_batches():
    density = FixationDensity()
    for count in (3, 1):
        boxes = torch.tensor([[[[2.0, 2, 4, 4]], [[0.0, 0, 8, 8]]]]).expand(count, 2, 1, 4)
        zeros = torch.zeros(count, 8, 8)
        density.add(Heatmaps(zeros, zeros, None, None, "", Gaze.name, boxes), {"image": torch.zeros(count, 1, 8, 8)})
    means = density.means()
    assert density.images == 4
    assert list(means) == ["first glimpse", "later glimpses"]
    assert means["first glimpse"].sum() == 4
    assert means["later glimpses"].min() == 1


def test_density_sums_over_processes():
    density = FixationDensity()
    zeros, boxes = torch.zeros(3, 8, 8), torch.tensor([[[[2.0, 2, 4, 4]]]]).expand(3, 1, 1, 4)
    density.add(Heatmaps(zeros, zeros, None, None, "", Gaze.name, boxes), {"image": torch.zeros(3, 1, 8, 8)})
    # sums of the other process, by shape: it counted one image, and each pixel of this image five times
    other = {(): torch.tensor(1), (8, 8): torch.full((8, 8), 5.0)}

    def reduce(value, reduce_op):
        assert reduce_op == "sum"
        return value + other[tuple(value.shape)]

    density.gather(SimpleNamespace(strategy=SimpleNamespace(reduce=reduce)))
    (mean,) = density.means().values()
    assert density.images == 4
    assert (mean[3, 3], mean[0, 0]) == (2, 1.25)
