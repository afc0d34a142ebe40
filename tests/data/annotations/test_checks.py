"""Test that problems with boxes and images are counted and named."""

from collections import Counter

import pytest
from PIL import Image

from tests.data.annotated import voc, yolo
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
def test_size_of_a_rotated_photograph_is_that_of_the_decoded_image(suffix, tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = tmp_path / f"{orientation}{suffix}"
        Image.new("RGB", (80, 60)).save(file, exif=exif)
        assert size_of(file) == read_image(file).shape[:2] == ((80, 60) if orientation > 4 else (60, 80))


@pytest.mark.parametrize("behind", [False, True])
def test_size_of_a_rotated_png_is_read_without_decoding(behind, tmp_path):
    file = tmp_path / "x.png"
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (80, 60)).save(file, exif=turned)
    content = file.read_bytes()
    start = content.index(b"eXIf") - 4
    exif = content[start : start + 12 + int.from_bytes(content[start : start + 4], "big")]
    bare = content.replace(exif, b"")
    at = bare.index(b"IEND" if behind else b"IDAT") - 4
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
