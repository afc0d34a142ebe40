"""The one place where image files are read and written."""

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from visionattn.errors import DataError, UsageError
from visionattn.files import write_file

# fmt: off
SUFFIXES = frozenset({
    ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tif", ".tiff", ".webp"
})
# fmt: on
"""What a folder's images end with, in lower case. HEIC may not be readable here: better a failure than silence."""

MAX_PIXELS = 178_000_000
"""Largest image that is decoded, in pixels; a small file may claim to be far larger than memory."""

_ORIENTATION = 0x0112  # of EXIF
_QUALITY = {".jpg": {"quality": 92}, ".jpeg": {"quality": 92}, ".webp": {"quality": 90}, ".png": {"compress_level": 3}}


def read_image(path: "str | bytes | os.PathLike[str]", *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read an image as it is meant to be seen.

    The rotation that the camera noted is applied; 16-bit values are scaled; CMYK and palettes are converted;
    transparency is laid over white; of an animation the first frame is taken.

    Args:
        path: any file name, also one that is no text.
        max_pixels: larger images are refused before they are decoded.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        DataError: there is no such file, it is no image, it is cut short or damaged, or too large; names the file.
    """
    name = os.fsdecode(path)
    if os.path.isdir(path):
        raise DataError(f"{name} is a folder, not an image")
    try:
        with open(path, "rb") as file:
            return _decode(file, name, max_pixels)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"there is no image {name}") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error


def decode_image(content: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """As `read_image`, of a file's content; `name` is what errors call it."""
    return _decode(io.BytesIO(content), name, max_pixels)


def _decode(file: BinaryIO, name: str, max_pixels: int) -> NDArray[np.uint8]:
    if max_pixels > MAX_PIXELS:  # a wish for more goes past Pillow's own limit, which is this one
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit and remarks on metadata; ours is below
            with Image.open(file) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise DataError(
                        f"{name}: {width:,} × {height:,} pixels; the limit is {max_pixels / 1e6:,.0f} MP (--max-pixels)"
                    )
                plain = image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(_ORIENTATION, 1) == 1
                picture_HWC = _plain_jpeg(file) if plain else None
                return _to_rgb(image) if picture_HWC is None else picture_HWC
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: more than {max_pixels / 1e6:,.0f} MP, which is the limit (--max-pixels)") from error
    except UnidentifiedImageError as error:
        reason = "is empty" if file.seek(0, os.SEEK_END) == 0 else "is no image that can be read"
        raise DataError(f"{name} {reason}") from error
    except MemoryError as error:
        raise DataError(f"{name}: no memory to decode it") from error
    except Exception as error:  # Pillow raises whatever a damaged file leads it to
        reason = str(error) or type(error).__name__
        cut = "truncated" in reason.lower() or "cut" in reason.lower()
        raise DataError(f"{name}: {'cut short' if cut else 'damaged'} ({reason})") from error


def upright(image: Image.Image) -> NDArray[np.uint8]:
    """Make (H, W, 3) uint8 RGB of an open PIL image, as `read_image` would of its file; the image stays as it is."""
    return _to_rgb(image.copy())


def write_image(path: "str | bytes | os.PathLike[str]", image_HWC: NDArray[np.uint8]) -> None:
    """Write an image so that no half of it ever stands under its name.

    Args:
        path: .jpg, .png or .webp; the folder must exist.
        image_HWC: (H, W, 3) uint8 RGB, or (H, W) uint8 or uint16 grey.

    Raises:
        DataError: the folder is missing, the disk is full, or the suffix is no image's; names the file.
    """
    try:
        content = encode_image(image_HWC, Path(os.fsdecode(path)).suffix)
    except UsageError as error:
        raise DataError(f"{os.fsdecode(path)}: {error}") from error
    write_file(path, content)


def encode_image(image_HWC: NDArray[np.uint8] | NDArray[np.uint16], suffix: str) -> bytes:
    """The content of an image file.

    Args:
        image_HWC: (H, W, 3) uint8 RGB, or (H, W) uint8 or uint16 grey.
        suffix: .jpg, .jpeg, .png or .webp.

    Raises:
        UsageError: the suffix is another.
    """
    suffix = suffix.lower()
    if suffix not in _QUALITY:
        raise UsageError(f"an image is written as one of {', '.join(_QUALITY)}")
    if suffix in (".jpg", ".jpeg") and image_HWC.ndim == 3:  # what Pillow would write, in two thirds of the time
        bgr_HWC = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR)
        return cv2.imencode(".jpg", bgr_HWC, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY[suffix]["quality"]])[1].tobytes()
    buffer = io.BytesIO()
    form = {".jpg": "JPEG", ".jpeg": "JPEG"}.get(suffix, suffix[1:])
    Image.fromarray(image_HWC).save(buffer, form, **_QUALITY[suffix])
    return buffer.getvalue()


def write_animation(
    path: "str | bytes | os.PathLike[str]", frames: Sequence[NDArray[np.uint8]], *, seconds: float = 0.8
) -> None:
    """Write an animation that runs for ever, so that no half of it ever stands under its name.

    Args:
        path: .webp or .gif, see `encode_animation`; the folder must exist.
        frames: at least one, (H, W, 3) uint8 RGB, all of one size.
        seconds: of a frame; the last stays three times as long.

    Raises:
        DataError: as `write_image`.
    """
    try:
        content = encode_animation(frames, Path(os.fsdecode(path)).suffix, seconds=seconds)
    except UsageError as error:
        raise DataError(f"{os.fsdecode(path)}: {error}") from error
    write_file(path, content)


def encode_animation(frames: Sequence[NDArray[np.uint8]], suffix: str, *, seconds: float = 0.8) -> bytes:
    """The content of a file with an animation that runs for ever.

    Args:
        frames: at least one, (H, W, 3) uint8 RGB, all of one size.
        suffix: .webp, without loss, or .gif, of 256 colours a frame.
        seconds: of a frame; the last stays three times as long.

    Raises:
        UsageError: the suffix is another.
    """
    suffix = suffix.lower()
    if suffix not in (".webp", ".gif"):
        raise UsageError("an animation is written as .webp or .gif")
    first, *others = [Image.fromarray(frame) for frame in frames]
    milliseconds = round(1000 * seconds)
    durations = [milliseconds] * len(others) + [3 * milliseconds]
    how: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    buffer = io.BytesIO()
    first.save(buffer, suffix[1:], save_all=True, append_images=others, duration=durations, loop=0, **how)
    return buffer.getvalue()


def _plain_jpeg(file: BinaryIO) -> NDArray[np.uint8] | None:
    """Decode a colour JPEG by OpenCV: the values of Pillow, which unpacks them twice, in two thirds of the time.

    None where the file does not end as it should, which OpenCV would hide under grey, or where it cannot be decoded.
    """
    file.seek(0)
    content = file.read()
    file.seek(0)
    if not content.endswith(b"\xff\xd9"):
        return None
    bgr_HWC = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if bgr_HWC is None else np.asarray(cv2.cvtColor(bgr_HWC, cv2.COLOR_BGR2RGB, dst=bgr_HWC), np.uint8)


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    upright, mode = image, image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    if mode in ("I", "F") or mode.startswith("I;16"):
        return _from_deep_grey(np.asarray(upright), wide=mode != "I")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return np.array(Image.alpha_composite(white, rgba).convert("RGB"))
    return np.array(upright.convert("RGB"))


def _from_deep_grey(values_HW: NDArray[np.generic], *, wide: bool) -> NDArray[np.uint8]:
    """Scale 16-bit integers, or floats of any range, to 8 bits; a 32-bit file (not `wide`) may hold 8 bits."""
    values = values_HW.astype(np.float64)
    if np.issubdtype(values_HW.dtype, np.integer):
        top = 65535 if wide or values.max(initial=0) > 255 else 255
        grey = values * (255 / top)
    else:
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
        grey = np.nan_to_num((values - low) * (255 / (high - low if high > low else 1)))
    return np.repeat(np.clip(np.rint(grey), 0, 255).astype(np.uint8)[..., None], 3, axis=2)
