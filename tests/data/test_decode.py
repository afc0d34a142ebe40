"""Test decoding: every kind of file gives the right RGB image, or an error that names the file."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.drawing.glimpses import film
from visionattn.data import read_grey, read_image, write_animation, write_image
from visionattn.errors import DataError


@pytest.fixture
def picture():
    """Return a picture without symmetry; it is smooth, so that JPEG changes its values only slightly."""
    rows, columns = np.mgrid[0:20, 0:30]
    return np.stack([rows * 8, columns * 6, 200 - rows * 4], -1).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation, picture, tmp_path):
    stored = {  # orientation → from the upright picture to the rows and columns in the file, as EXIF defines them
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: np.rot90(p, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored[orientation](picture))).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), picture)


@pytest.mark.parametrize("top", [65535, 250])
def test_16_bit_grey_keeps_its_range(top, tmp_path):
    values = np.linspace(0, top, 30 * 20).reshape(20, 30).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    read = read_image(tmp_path / "x.png")
    assert read.shape == (20, 30, 3)
    assert abs(read[..., 0].astype(float) - values / 257).max() <= 1
    assert (read[..., 0] == read[..., 2]).all()


def test_16_bit_colour_keeps_its_range(picture, tmp_path):
    wide = picture.astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in wide)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30, 20, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert abs(read_image(tmp_path / "x.png").astype(int) - picture).max() <= 1


def test_transparency_is_blended_with_white(picture, tmp_path):
    alpha = np.full((20, 30, 1), 128, np.uint8)
    alpha[:, :10] = 0
    Image.fromarray(np.concatenate([picture, alpha], 2)).save(tmp_path / "x.png")
    opacity = alpha / 255
    np.testing.assert_allclose(read_image(tmp_path / "x.png"), picture * opacity + 255 * (1 - opacity), atol=1)


def test_palette_with_a_transparent_colour_is_converted(tmp_path):
    image = Image.new("P", (4, 2), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "x.png", transparency=0)
    read = read_image(tmp_path / "x.png")
    assert read[0, 0].tolist() == [255, 255, 255]
    assert read[1, 1].tolist() == [0, 0, 255]


def test_cmyk_becomes_rgb(picture, tmp_path):
    Image.fromarray(picture).convert("CMYK").save(tmp_path / "x.jpg", quality=98)
    assert abs(read_image(tmp_path / "x.jpg").astype(int) - picture).mean() < 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "I", "F"])
def test_every_mode_is_converted_to_rgb(mode, picture, tmp_path):
    suffix = "tif" if mode in "IF" else "png"
    Image.fromarray(picture).convert("L").convert(mode).save(tmp_path / f"x.{suffix}")
    read = read_image(tmp_path / f"x.{suffix}")
    assert read.shape == (20, 30, 3)
    assert read.dtype == np.uint8
    assert read.std() > 5


def test_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.gif")[0, 0].tolist() == [255, 0, 0]


def test_file_whose_name_is_not_valid_text_is_read(picture, tmp_path):
    path = bytes(tmp_path) + b"/\xff\xfe.png"
    Image.fromarray(picture).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(path.decode(errors="surrogateescape"))
    np.testing.assert_array_equal(read_image(path), picture)


def test_an_open_file_is_read_and_named_in_errors(picture, tmp_path):
    write_image(tmp_path / "a.png", picture)
    content = (tmp_path / "a.png").read_bytes()
    np.testing.assert_array_equal(read_image(io.BytesIO(content)), picture)
    with open(tmp_path / "a.png", "rb") as file:
        np.testing.assert_array_equal(read_image(file), picture)
    with pytest.raises(DataError, match=r"^the image: "):
        read_image(io.BytesIO(content[:50]))
    (tmp_path / "a.png").write_bytes(b"")
    with open(tmp_path / "a.png", "rb") as file, pytest.raises(DataError, match=r"a\.png is empty"):
        read_image(file)


def test_formats_for_which_pillow_starts_a_program_are_refused(tmp_path, monkeypatch):
    """PostScript in a file that is named as a photograph."""
    import subprocess

    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "cat.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with Image.open(tmp_path / "cat.jpg") as image:
        assert image.format == "EPS"
    with pytest.raises(DataError, match="is not an image that can be read"):
        read_image(tmp_path / "cat.jpg")


def test_names_that_cannot_be_opened_or_shown_are_errors(tmp_path):
    with pytest.raises(DataError, match="null byte"):
        read_image("a\0.png")
    with pytest.raises(DataError) as caught:
        read_image(str(tmp_path / "\udcff\n.png"))
    str(caught.value).encode()
    assert "\n" not in str(caught.value)


def test_only_pillows_warnings_are_hidden_while_an_image_is_decoded(picture, tmp_path, monkeypatch):
    decode = Image.open

    def warn_and_decode(file, **options):
        warnings.warn("of another thread", UserWarning, stacklevel=1)
        warnings.warn_explicit("odd metadata", UserWarning, "Image.py", 1, module="PIL.Image")
        return decode(file, **options)

    write_image(tmp_path / "a.png", picture)
    monkeypatch.setattr(Image, "open", warn_and_decode)
    before = list(warnings.filters)
    with pytest.warns(UserWarning, match="of another thread") as caught:
        read_image(tmp_path / "a.png")
    assert [str(warning.message) for warning in caught] == ["of another thread"]
    assert warnings.filters == before


def test_unreadable_files_raise_with_name_and_reason(picture, tmp_path):
    def fails(name, *parts, **options):
        with pytest.raises(DataError) as error:
            read_image(tmp_path / name, **options)
        assert all(part in str(error.value) for part in (name, *parts)), str(error.value)

    Image.fromarray(picture).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) * 6 // 10])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image")
    fails("missing.jpg", "there is no")
    fails("cut.jpg", "cut short")
    fails("empty.jpg", "empty")
    fails("text.jpg", "not an image")
    fails("whole.jpg", "30", "20", max_pixels=599)
    assert read_image(tmp_path / "whole.jpg", max_pixels=600).shape == (20, 30, 3)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_written_images_are_read_back(suffix, picture, tmp_path):
    write_image(tmp_path / f"x{suffix}", picture)
    assert abs(read_image(tmp_path / f"x{suffix}").astype(int) - picture).max() <= (0 if suffix == ".png" else 24)
    assert len(list(tmp_path.iterdir())) == 1


def test_failed_write_keeps_the_old_file(picture, tmp_path, monkeypatch):
    write_image(tmp_path / "x.png", picture)
    before = (tmp_path / "x.png").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises((OSError, DataError), match="No space left"):
        write_image(tmp_path / "x.png", picture[::-1])
    assert (tmp_path / "x.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpeg_is_decoded_as_by_pillow_and_damaged_files_fail_as_with_pillow(tmp_path, subsampling, progressive, capfd):
    random = np.random.default_rng(subsampling)
    rows, columns = np.mgrid[:45, :67]
    picture = np.stack([128 + 100 * np.sin(rows / 9 + c) * np.cos(columns / 7 - c) for c in range(3)], -1)
    path = tmp_path / "x.jpg"
    Image.fromarray(picture.astype(np.uint8)).save(path, quality=85, subsampling=subsampling, progressive=progressive)
    whole = path.read_bytes()
    np.testing.assert_array_equal(read_image(path), np.array(Image.open(path).convert("RGB")))
    for _ in range(40):  # change a byte at a random position
        damaged = bytearray(whole)
        damaged[random.integers(2, len(whole) - 2)] = random.integers(256)
        path.write_bytes(damaged)
        try:
            expected = np.array(Image.open(path).convert("RGB"))
        except Exception:  # Pillow may raise any exception
            with pytest.raises(DataError):
                read_image(path)
        else:
            assert read_image(path).shape == expected.shape
    for cut in range(3, len(whole), 97):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError):
            read_image(path)


@pytest.mark.parametrize("size", [(48, 64), (33, 17), (1, 1)])
def test_jpeg_is_encoded_to_the_same_values_as_by_pillow(tmp_path, size):
    rows, columns = np.mgrid[: size[0], : size[1]]
    picture = np.stack([128 + 100 * np.sin(rows / 9 + c) * np.cos(columns / 7 - c) for c in range(3)], -1)
    picture = picture.astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "theirs.jpg", quality=92)
    write_image(tmp_path / "ours.jpg", picture[:, ::-1][:, ::-1])  # the array is not contiguous in memory
    ours, theirs = (np.array(Image.open(tmp_path / f"{name}.jpg")) for name in ("ours", "theirs"))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_animation_is_read_back_frame_by_frame(tmp_path, suffix):
    frames = film(300)
    path = tmp_path / f"seen{suffix}"
    write_animation(path, frames, seconds=0.5)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        assert image.n_frames == 2
        assert image.info["loop"] == 0
        for number, frame in enumerate(frames):
            image.seek(number)
            image.load()
            assert image.info["duration"] == (500, 1500)[number]
            assert np.abs(np.array(image.convert("RGB")).astype(int) - frame).max() <= (0 if suffix == ".webp" else 8)


def test_animation_with_another_suffix_or_in_a_missing_folder_raises(tmp_path):
    with pytest.raises(DataError, match=r"an animation is written as \.webp or \.gif"):
        write_animation(tmp_path / "seen.png", film())
    with pytest.raises(DataError, match="cannot be written"):
        write_animation(tmp_path / "none" / "seen.gif", film())


def test_grey_images_keep_their_values_and_are_turned_upright(tmp_path):
    values = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90°
    Image.fromarray(values).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_grey(tmp_path / "turned.png"), np.rot90(values, -1))
    Image.fromarray(values > 100).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_grey(tmp_path / "bits.png"), 255 * (values > 100))
    Image.new("RGB", (4, 4)).save(tmp_path / "colours.png")
    with pytest.raises(DataError, match="has colours or transparency"):
        read_grey(tmp_path / "colours.png")
