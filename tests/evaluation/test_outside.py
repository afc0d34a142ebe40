"""A method's own heatmaps, from a folder or a function, score as the method does; wrong heatmaps are refused alone."""

import math
import os
import pickle
import zipfile

import cv2
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.refusals import refuses
from visionattn.data import Preprocess, collate, prepare
from visionattn.errors import DataError, UsageError
from visionattn.evaluation import FolderMaps, FunctionMethod, folders_of, score
from visionattn.evaluation.outside import read_heatmap
from visionattn.maps import GradCAM

COUNT = 12
SIDE = 128
CROP = Preprocess(SIDE, crop_fraction=0.8)


def pictures(size, preprocess=CROP, count=COUNT):
    """Return a batch of smooth pictures (height, width), prepared for a model, with a box and a path in a class."""
    random = np.random.default_rng(0)
    samples = []
    for index in range(count):
        coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        sample = prepare(cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC), preprocess)
        box = torch.tensor([20.0, 24, 80, 100])
        samples.append({**sample, "path": f"photos/class{index % 2}/{index // 2}.jpg", "box": box})
    return collate(samples)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5).eval()


def write(folder, batch, maps, suffix):
    """Write one heatmap per image, in sub-folders as the images'."""
    for path, heatmap in zip(batch["path"], maps, strict=True):
        stem = folder / os.path.splitext(path.removeprefix("photos/"))[0]
        stem.parent.mkdir(parents=True, exist_ok=True)
        file = stem.with_suffix(suffix)
        if suffix == ".npy":
            np.save(file, heatmap)
        elif suffix == ".npz":
            np.savez(file, heatmap=heatmap, other=np.ones(3))
        else:
            Image.fromarray(np.rint(np.asarray(heatmap) * 65535).astype(np.uint16)).save(file)
    return FolderMaps(folder)


@pytest.mark.parametrize(("suffix", "within"), [(".npy", 1e-6), (".npz", 1e-6), (".png", 2e-3)])
def test_heatmaps_of_the_input_in_files_score_as_their_method(suffix, within, model, tmp_path):
    batch = pictures((90, 120))
    heatmaps = GradCAM()(model, batch["image"], target=model(batch["image"]).argmax(1)).heatmaps.numpy()
    methods = {"gradcam": GradCAM(), "theirs": write(tmp_path, batch, heatmaps, suffix)}
    scores = score(
        model,
        [{k: v[part] for k, v in batch.items()} for part in (slice(7), slice(7, None))],
        methods,
        steps=4,
        copies=1,
    )
    assert scores.failed == {}
    assert scores.controls["theirs"] == scores.controls["gradcam"]
    for metric in ("deletion", "insertion", "pointing", "energy", "iou"):
        np.testing.assert_allclose(scores.values["theirs"][metric], scores.values["gradcam"][metric], atol=within)
    assert not scores.measured("theirs", "shuffled")
    assert "shuffled" not in scores.unbeaten("theirs")
    assert " – " in str(scores)
    assert "cannot be made again" in str(scores)
    assert "shuffled" not in scores.to_dict()["values"]["theirs"]


@pytest.mark.parametrize("fit", ["crop", "letterbox", "stretch"])
def test_heatmaps_of_the_picture_are_carried_into_the_input(fit, model, tmp_path):
    """The way there and back through the picture's pixels changes the figures of Grad-CAM by little."""
    batch = pictures((180, 250), Preprocess(SIDE, fit=fit, crop_fraction=0.9 if fit == "crop" else 1.0))
    heatmaps = GradCAM()(model, batch["image"], target=model(batch["image"]).argmax(1)).heatmaps.numpy()
    carried = [place.carry(heatmap) for place, heatmap in zip(batch["placement"], heatmaps, strict=True)]
    whole = torch.nn.functional.interpolate(torch.from_numpy(heatmaps)[:, None], (SIDE, SIDE), mode="bilinear")[:, 0]
    folder = write(tmp_path, batch, carried, ".npy")
    got = folder.of_batch(batch)
    seen = torch.ones(SIDE, SIDE, dtype=torch.bool)
    if fit == "crop":  # a picture's pixel at the crop's edge is partly outside
        seen[:2] = seen[-2:] = seen[:, :2] = seen[:, -2:] = False
    if fit == "letterbox":  # the input's rows above and below the picture are in no file
        seen[:19] = seen[-19:] = False
    assert (got - whole)[:, seen].abs().max() < 0.06
    if fit == "crop":
        scores = score(model, [batch], {"gradcam": GradCAM(), "theirs": folder}, steps=4, copies=1)
        assert scores.controls["theirs"][0] == "random 128×128"
        for metric, within in {"deletion": 0.02, "insertion": 0.02, "energy": 0.02, "iou": 0.05}.items():
            mine, theirs = (scores.estimate(name, metric).value for name in ("gradcam", "theirs"))
            assert theirs == pytest.approx(mine, abs=within), metric


def test_a_peak_in_the_picture_is_a_peak_at_its_place_in_the_input(tmp_path):
    batch = pictures((200, 300), count=3)
    heatmap = np.zeros((200, 300), np.float32)
    heatmap[120:126, 140:146] = 1
    maps = write(tmp_path, batch, [heatmap] * 3, ".png").of_batch(batch)
    x, y = batch["placement"][0].to_input(np.array([[143.0, 123.0]]))[0]
    centres = torch.arange(SIDE) + 0.5
    for map_HW in maps:
        assert float((map_HW.sum(1) * centres).sum() / map_HW.sum()) == pytest.approx(y, abs=0.2)
        assert float((map_HW.sum(0) * centres).sum() / map_HW.sum()) == pytest.approx(x, abs=0.2)


def test_a_function_with_a_methods_heatmaps_scores_as_the_method(model):
    """The function computes Grad-CAM with autograd alone; it also gets the models with shuffled weights."""
    batch = pictures((90, 120))

    def grad_cam(model, images_BCHW, target_B):
        features = model.forward_features(images_BCHW)
        logits = model.forward_head(features)
        (gradient,) = torch.autograd.grad(logits.gather(1, target_B[:, None]).sum(), features)
        return (features * gradient.mean((2, 3), keepdim=True)).sum(1).relu().detach()

    scores = score(model, [batch], {"gradcam": GradCAM(), "mine": grad_cam}, steps=4, copies=2)
    assert scores.failed == {}
    for metric in scores.metrics:
        np.testing.assert_allclose(scores.values["mine"][metric], scores.values["gradcam"][metric], atol=1e-4)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda model, images, target: images, r"must return \(B, h, w\) heatmaps .* got \(12, 3, 128, 128\)"),
        (lambda model, images, target: images[:5, 0], "for B = 12 images"),
        (lambda model, images, target: images[:, 0] * math.nan, "hold NaN or infinity"),
        (lambda model, images, target: [1, 2], "got list"),
        (lambda model, images, target: 1 / 0, "failed .ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_function_is_refused(function, reason, model):
    refuses(ValueError, reason, FunctionMethod(function), model, pictures((90, 120))["image"])


def test_wrong_heatmaps_are_left_out_and_the_rest_is_scored(model, tmp_path):
    batch = pictures((90, 120))
    write(tmp_path, batch, np.random.default_rng(0).random((COUNT, 7, 7)), ".npy")
    os.remove(tmp_path / "class1" / "5.npy")  # the last image's
    parts = [{key: value[part] for key, value in batch.items()} for part in (slice(6), slice(6, None))]
    methods = {"folder": FolderMaps(tmp_path), "grows": lambda *_: next(growing), "gradcam": GradCAM()}
    growing = (torch.rand(6, side, side) for side in (4, 4, 5, 5))
    scores = score(model, parts, methods, steps=2, copies=1)
    assert list(scores.controls) == ["gradcam"]
    assert scores.images == COUNT
    assert "has no heatmap of photos/class1/5.jpg" in scores.failed["folder"]
    assert "its heatmaps have two sizes, 4×4 and 5×5" in scores.failed["grows"]


def change(number):
    """Return a function that spoils the file of one image, and the reason that must follow."""

    def wrong_ratio(file):
        np.save(file, np.ones((4, 9)))

    def with_nan(file):
        np.save(file, np.full((7, 7), np.nan))

    def three_dimensional(file):
        np.save(file, np.ones((7, 7, 3)))

    def pickled(file):
        np.save(file, np.array([[print]], dtype=object), allow_pickle=True)

    def pure_pickle(file):
        file.write_bytes(pickle.dumps([1]))

    def cut_short(file):
        file.write_bytes(file.read_bytes()[:-20])

    def matched_twice(file):
        np.save(file.with_name("0.jpg.npy"), np.ones((7, 7)))

    def coloured(file):
        file.unlink()
        Image.new("RGB", (7, 7)).save(file.with_suffix(".png"))

    def unnamed(file):
        file.unlink()
        np.savez(file.with_suffix(".npz"), a=np.ones((7, 7)), b=np.ones((7, 7)))

    def another_size(file):
        np.save(file, np.random.default_rng(0).random((8, 8)))

    return {
        "missing": (os.remove, "has no heatmap of photos/class1/0.jpg"),
        "ratio": (wrong_ratio, r"is 4×9, which has the ratio neither of the picture \(90×120\) nor of .*128×128"),
        "nan": (with_nan, "0.npy holds NaN or infinity"),
        "3-D": (three_dimensional, r"shape \(7, 7, 3\); a heatmap is a 2-D array"),
        "object": (pickled, "0.npy: is not an array that can be read"),
        "pickle": (pure_pickle, "0.npy: is not an array that can be read"),
        "cut": (cut_short, "0.npy: is not an array that can be read"),
        "twice": (matched_twice, "0.jpg.npy and .*0.npy both match photos/class1/0.jpg"),
        "colours": (coloured, "0.png has colours"),
        "unnamed": (unnamed, "0.npz holds a, b; one array must be called heatmap"),
        "size": (another_size, "two sizes, 7×7 and 8×8"),
    }[number]


@pytest.mark.parametrize(
    "case", ["missing", "ratio", "nan", "3-D", "object", "pickle", "cut", "twice", "colours", "unnamed", "size"]
)
def test_a_folder_with_one_wrong_heatmap_is_refused(case, tmp_path):
    batch = pictures((90, 120), count=2)
    write(tmp_path, batch, np.random.default_rng(0).random((2, 7, 7)), ".npy")
    spoil, reason = change(case)
    spoil(tmp_path / "class1" / "0.npy")
    refuses(ValueError, reason, FolderMaps(tmp_path).of_batch, batch)


def test_one_file_is_not_the_heatmap_of_two_images(tmp_path):
    batch = pictures((90, 120), count=2)  # class0/0.jpg and class1/0.jpg
    np.save(tmp_path / "0.npy", np.ones((7, 7)))
    refuses(
        DataError,
        "0.npy matches two images, photos/class0/0.jpg and photos/class1",
        FolderMaps(tmp_path).of_batch,
        batch,
    )


def test_a_square_heatmap_of_a_square_picture_needs_the_frame_only_if_the_model_crops(tmp_path):
    for preprocess, clear in ((CROP, False), (Preprocess(SIDE), True)):
        batch = pictures((90, 90), preprocess, count=1)
        np.save(tmp_path / "0.npy", np.eye(7))
        if clear:
            assert torch.equal(FolderMaps(tmp_path).of_batch(batch)[0], torch.eye(7))
            continue
        refuses(
            UsageError, "may span the picture or the model's input.*--maps-span", FolderMaps(tmp_path).of_batch, batch
        )
        assert torch.equal(FolderMaps(tmp_path, frame="input").of_batch(batch)[0], torch.eye(7))
        assert FolderMaps(tmp_path, frame="picture").of_batch(batch).shape == (1, SIDE, SIDE)


def test_words_of_the_command_line_become_folders(tmp_path):
    assert list(folders_of([f"theirs={tmp_path}", f"other={tmp_path}"], ["raw"])) == ["theirs", "other"]
    refuses(UsageError, "takes NAME=FOLDER, got 'theirs'", folders_of, ["theirs"], [])
    refuses(UsageError, "'gradcam' is already the name of a method", folders_of, [f"gradcam={tmp_path}"], [])
    refuses(UsageError, "'raw@1' is already", folders_of, [f"raw@1={tmp_path}"], ["raw@1"])
    refuses(UsageError, "'x' is already", folders_of, [f"x={tmp_path}"] * 2, [])
    refuses(UsageError, "there is no folder of heatmaps .*gone", folders_of, [f"x={tmp_path}/gone"], [])
    refuses(UsageError, "frame must be picture or input", FolderMaps, tmp_path, frame="image")


def test_grey_pngs_keep_their_bits(tmp_path):
    for dtype, top in ((np.uint8, 255), (np.uint16, 65535)):
        values = np.linspace(0, top, 77).reshape(7, 11).astype(dtype)
        Image.fromarray(values).save(tmp_path / "map.png")
        np.testing.assert_array_equal(read_heatmap(tmp_path / "map.png"), values)


def test_a_packed_array_that_claims_to_be_huge_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "0.npz", "w", zipfile.ZIP_DEFLATED) as packed:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (100000000, 100000000), }"
        header = header.ljust(118 - 10 - 1) + b"\n"
        packed.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 64)
    refuses(DataError, "is not an array that can be read", read_heatmap, tmp_path / "0.npz")
