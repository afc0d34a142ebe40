"""Test the digits on a canvas: boxes, pieces of other digits, and reproducible pictures."""

import numpy as np
import torch

from tests.data.synthetic.handwriting import FakeMNIST
from tests.refusals import refuses
from visionattn.data import DigitsOnCanvasData, Preprocess
from visionattn.data.synthetic.digits_on_canvas import DigitsOnCanvas, _uniform


def canvas(count=40, **options):
    """Return a data set whose digits are rectangles of random position and brightness."""
    random = np.random.default_rng(0)
    digits = np.zeros((count, 28, 28), np.uint8)
    for digit in digits:
        top, left = random.integers(2, 10, 2)
        digit[top : top + 12, left : left + 9] = random.integers(100, 256)
    chosen = {"canvas": 60, "fragments": 0, "fragment_size": 8, "distort": 0.0, "shift": 0.0, "seed": 5, **options}
    grey = Preprocess(chosen["canvas"], fit="stretch", mean=(0.0,), std=(1.0,))
    return DigitsOnCanvas(digits, np.arange(count), name="canvas/val", preprocess=grey, **chosen)


def test_box_is_the_bounding_box_of_the_digit():
    dataset = canvas()
    batch = dataset.__getitems__(list(range(40)))
    assert batch["image"].shape == (40, 1, 60, 60)
    assert torch.equal(batch["label"], torch.arange(40))
    corners = set()
    for index in range(40):
        picture = (batch["image"][index, 0] * 255).round().to(torch.uint8).numpy()
        left, top, right, bottom = batch["box"][index].int().tolist()
        corners.add((left, top))
        rows, columns = np.nonzero(dataset.digits[index].numpy())
        ink = dataset.digits[index].numpy()[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        np.testing.assert_array_equal(picture[top:bottom, left:right], ink)
        assert picture.astype(int).sum() == ink.astype(int).sum()
    assert len(corners) > 35
    assert batch["box"].min() >= 0
    assert batch["box"].max() <= 60


def test_pieces_are_squares_of_other_digits_and_overlaps_take_the_maximum():
    uncluttered, cluttered = canvas(), canvas(fragments=3)
    levels = {int(digit.max()) for digit in uncluttered.digits}  # each digit has a single brightness
    for index in range(40):
        samples = [dataset[index] for dataset in (uncluttered, cluttered)]
        assert torch.equal(samples[0]["box"], samples[1]["box"])
        before, after = ((sample["image"][0] * 255).round().int() for sample in samples)
        assert (after >= before).all()
        assert {int(level) for level in after.unique() if level} <= levels
        changed = (after != before).sum()
        assert changed <= 3 * 64
    assert any(not torch.equal(uncluttered[index]["image"], cluttered[index]["image"]) for index in range(40))


def test_index_and_seed_determine_a_picture():
    dataset = canvas(fragments=2, distort=0.2, shift=2.0)
    keys = [(3, 99), (7, 99), (3, 100), (3, 99)]
    batch = dataset.__getitems__(keys)
    assert torch.equal(batch["image"][0], batch["image"][3])
    assert not torch.equal(batch["image"][0], batch["image"][2])
    assert torch.equal(dataset[3, 99]["image"], batch["image"][0])
    for image, path in zip(batch["image"], batch["path"], strict=True):
        picture = dataset.read_source(path)
        assert picture.shape == (60, 60, 3)
        np.testing.assert_array_equal(picture[..., 1], (image[0] * 255).round().numpy().astype(np.uint8))
    assert torch.equal(canvas(seed=5)[4]["image"], canvas(seed=5)[4]["image"])
    assert not torch.equal(canvas(seed=5)[4]["image"], canvas(seed=6)[4]["image"])
    refuses(IndexError, "out of range", lambda: dataset[40])


def test_seeds_give_uniform_uncorrelated_numbers():
    numbers = _uniform(np.arange(5000, dtype=np.uint64), 4)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.abs(numbers.mean(0) - 0.5).max() < 5 / (12 * 5000) ** 0.5
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.06
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.06


def test_data_module_draws_new_training_images_every_epoch_and_the_same_validation_images():
    data = DigitsOnCanvasData("nowhere", dataset=FakeMNIST, canvas=40, val_size=100, batch_size=50, distort=0.1)
    data.setup("fit")
    loader = data.train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        epochs.append(torch.cat([batch["image"].flatten(1) for batch in loader]).sum(1).sort()[0])
    assert len(epochs[0]) == 500
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])
    first, again = (next(iter(data.val_dataloader())) for _ in range(2))
    assert torch.equal(first["image"], again["image"])
    data.setup("test")
    assert sum(len(batch["label"]) for batch in data.test_dataloader()) == 100
    assert data.preprocess.channels == 1
    assert data.class_names[3] == "3 - name"
    assert data.class_counts.tolist() == [50] * 10


def test_canvas_as_large_as_the_digits_shows_them_unchanged():
    data = DigitsOnCanvasData("nowhere", dataset=FakeMNIST, canvas=28, val_size=100)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    torch.testing.assert_close(batch["image"][:, 0], FakeMNIST("", train=False).data.float() / 255)


def test_incompatible_sizes_raise():
    for options in ({"canvas": 27}, {"fragment_size": 29}, {"distort": 0.6}, {"shift": -1.0}):
        refuses(ValueError, "must be", DigitsOnCanvasData, "nowhere", dataset=FakeMNIST, val_size=100, **options)


def test_grey_input_is_the_luma_and_denormalise_inverts_it():
    grey = Preprocess((4, 6), fit="stretch", mean=(0.25,), std=(0.5,))
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    image, _ = grey(picture)
    luma = picture @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(image[0], (luma / 255 - 0.25) / 0.5, atol=0.005)
    back = grey.denormalise(image)
    assert back.shape == (4, 6, 3)
    assert np.abs(back - luma[..., None]).max() <= 1
    refuses(ValueError, "three numbers each, or one", Preprocess, 4, mean=(0.5, 0.5), std=(1.0, 1.0))
