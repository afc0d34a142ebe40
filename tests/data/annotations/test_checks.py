"""Test that problems with boxes and images are counted and named."""

from collections import Counter

import pytest
from PIL import Image

from tests.data.annotated import LAYOUTS, voc, yolo
from visionattn.data.annotations.checks import check, size_of
from visionattn.data.decode import read_image
from visionattn.errors import DataError


def test_bad_xml_and_bad_lines_are_reported(tmp_path):
    root = voc(tmp_path / "voc")
    (root / "Annotations" / "train_1.xml").write_text("<annotation><object>")
    (root / "JPEGImages" / "train_3.png").unlink()
    kinds = Counter(problem.kind for problem in check(root).problems)
    assert kinds == {"unreadable annotation": 1, "not annotated": 1, "missing image": 1}
    root = yolo(tmp_path / "yolo")
    (root / "labels" / "train" / "train_1.txt").write_text("1 0.5 0.5 1.0\nx 1 2 3 4\n7 .5 .5 .1 .1\n0.5 .5 .5 .1 .1\n")
    (root / "labels" / "train" / "stray.txt").write_text("1 0.5 0.5 1.0 1.0\n")
    kinds = Counter(problem.kind for problem in check(root).problems)
    assert kinds == {"unreadable annotation": 2, "unknown class": 2, "missing image": 1}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".webp"])
def test_size_of_a_rotated_photograph_equals_the_size_of_the_decoded_image(suffix, tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = tmp_path / f"{orientation}{suffix}"
        Image.new("RGB", (80, 60)).save(file, exif=exif)
        assert size_of(file) == read_image(file).shape[:2] == ((80, 60) if orientation > 4 else (60, 80))


@pytest.mark.parametrize("exif_after_pixels", [False, True])
def test_size_of_a_rotated_png_is_read_without_decoding(exif_after_pixels, tmp_path):
    """EXIF data after the pixels is found; a PNG whose pixels cannot be decoded still has a size."""
    file = tmp_path / "x.png"
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.new("RGB", (80, 60)).save(file, exif=rotated)
    content = file.read_bytes()
    start = content.index(b"eXIf") - 4
    exif = content[start : start + 12 + int.from_bytes(content[start : start + 4], "big")]
    bare = content.replace(exif, b"")
    at = bare.index(b"IEND" if exif_after_pixels else b"IDAT") - 4
    file.write_bytes(bare[:at] + exif + bare[at:])
    assert size_of(file) == (80, 60)
    pixels = bare.index(b"IDAT") + 4
    file.write_bytes(bare[:pixels] + bytes(10) + bare[pixels + 10 :])
    assert size_of(file) == (60, 80)
    with pytest.raises(DataError):
        read_image(file)


def test_bad_box_in_two_splits_is_counted_once(tmp_path):
    root = voc(tmp_path)
    file = root / "Annotations" / "train_0.xml"
    file.write_text(file.read_text().replace("<xmin>5</xmin>", "<xmin>nan</xmin>"))
    names = root / "ImageSets" / "Main" / "val.txt"
    names.write_text("train_0\nval_1\n")
    assert Counter(problem.kind for problem in check(root).problems) == {"not finite": 1, "leak": 1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image_is_decoded(layout, tmp_path):
    """An image that is cut short is found in each layout; its header and its size are intact."""
    root = LAYOUTS[layout](tmp_path)
    file = next(root.rglob("train_1.png"))
    file.write_bytes(file.read_bytes()[:3000])
    assert size_of(file) == (60, 80)
    seen = []
    report = check(root, progress=lambda results, total: seen.append(total) or results)
    assert [(problem.kind, "cut short" in problem.detail) for problem in report.problems] == [
        ("unreadable image", True)
    ]
    assert seen == [7]


def test_stated_sizes_are_written_as_width_and_height_and_may_not_be_zero(tmp_path):
    root = voc(tmp_path)
    for number, (width, height) in enumerate(((0, 0), (81, 60))):
        file = root / "Annotations" / f"train_{number}.xml"
        text = file.read_text().replace("<width>80<", f"<width>{width}<").replace("<height>60<", f"<height>{height}<")
        file.write_text(text)
    report = check(root)
    assert [(problem.kind, problem.where) for problem in report.problems] == [
        ("wrong size", "train_1.xml"),
        ("no size", "train_0.xml"),
    ]
    assert "gives 81×60 pixels (width × height), but train_1.png has 80×60" in report.problems[0].detail
    assert [image.path.name for image in report.splits["train"]] == [f"train_{number}.png" for number in (0, 2, 3, 4)]


def test_shared_details_are_written_once_and_images_without_boxes_are_named(tmp_path):
    root = voc(tmp_path)
    for number in (0, 3, 4):
        (root / "JPEGImages" / f"train_{number}.png").unlink()
    lines = check(root).lines()
    assert sum("--images DIR here, --data.images DIR in training" in line for line in lines) == 1
    assert [line for line in lines if line.startswith(" " * 8)] == [
        "        train_2.png", "        train_0.xml", "        train_3.xml", "        train_4.xml"
    ]  # fmt: skip
    assert [line for line in check(root).lines(2) if "more" in line] == ["      … and 1 more"]
