"""Read and write image files: decode images with Pillow and OpenCV, encode images and animations."""

import contextlib
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypedDict, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from visionattn.errors import DataError, UsageError
from visionattn.files import local_path, printable, write_file

# fmt: off
SUFFIXES = frozenset({
    ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tif", ".tiff", ".webp"
})
# fmt: on
"""Suffixes (lower case) by which image files are found in folders. Decoding HEIC may fail; the failure is reported."""

MAX_PIXELS = 178_000_000
"""Default limit on the pixels of a decoded image. It is needed because a small file can hold a huge image."""

ImageSource: TypeAlias = "str | bytes | os.PathLike[str] | BinaryIO"
"""Name of a file, which may contain bytes that are not valid text, or a file that is open for reading. Bytes are always
a name; `io.BytesIO(content)` is the content of a file."""

_Convert: TypeAlias = Callable[[Image.Image], NDArray[Any]]  # the values of a grey image may have any type
_REFUSED = ("EPS",)
"""Formats for which Pillow starts a program (Ghostscript) on the content of the file."""

_ORIENTATION = 0x0112  # EXIF tag
_OF_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # a filter of Python's warnings
_QUALITY = {".jpg": {"quality": 92}, ".jpeg": {"quality": 92}, ".webp": {"quality": 90}, ".png": {"compress_level": 3}}


def read_image(path: ImageSource, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read an image file as 8-bit RGB, upright.

    The EXIF rotation is applied. 16-bit values are scaled to 8 bits. CMYK and palette images are converted to RGB.
    Transparent pixels are blended with white. Of an animation, only the first frame is read.

    Args:
        path: see `ImageSource`.
        max_pixels: largest H·W that is decoded (default: `MAX_PIXELS`). Larger images are refused before decoding.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UsageError: the path is an address such as s3://bucket/x.jpg.
        DataError: the file is missing, is not an image, is cut short or damaged, or is too large. The message names
            the file.
    """
    return _read(path, max_pixels, _to_rgb)


def read_grey(path: ImageSource, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.generic]:
    """Read a grey image file with its own values.

    Returns:
        (H, W): uint8, or uint16 or int32 for 16 bits.

    Raises:
        UsageError: as for `read_image`.
        DataError: as for `read_image`, or the image has colours, a palette or transparency.
    """
    grey_HW = _read(path, max_pixels, _to_grey)
    if grey_HW.ndim != 2:
        raise DataError(f"{_name(path)} has colours or transparency; a grey image is needed")
    return grey_HW


def _read(path: ImageSource, max_pixels: int, convert: _Convert) -> NDArray[Any]:
    name = _name(path)
    if not isinstance(path, (str, bytes, os.PathLike)):
        return _decode(path, name, max_pixels, convert)
    if os.path.isdir(path):
        raise DataError(f"{name} is a folder, not an image")
    try:
        with open(path, "rb") as file:
            return _decode(file, name, max_pixels, convert)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"there is no image {name}") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a name with a null byte
        raise DataError(f"{name}: cannot be read ({error})") from error


def decode_image(content: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode the content of an image file, as `read_image` does; error messages call the image `name`."""
    return _decode(io.BytesIO(content), name, max_pixels, _to_rgb)


def _name(path: ImageSource) -> str:
    if isinstance(path, (str, bytes, os.PathLike)):
        return printable(local_path(path))
    name = getattr(path, "name", None)
    return printable(name) if isinstance(name, str) else "the image"


def _decode(file: BinaryIO, name: str, max_pixels: int, convert: _Convert) -> NDArray[Any]:
    if max_pixels > MAX_PIXELS:  # Pillow has a limit of its own: raise Pillow's limit to the caller's
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    try:
        Image.init()  # registers the formats of all of Pillow's plugins
        known = [name for name in Image.OPEN if name not in _REFUSED]
        with _without_pillow_warnings(), Image.open(file, formats=known) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(
                    f"{name}: {width:,} × {height:,} pixels; the limit is {max_pixels / 1e6:,.0f} MP (--max-pixels)"
                )
            plain = (
                convert is _to_rgb
                and image.format == "JPEG"
                and image.mode == "RGB"
                and image.getexif().get(_ORIENTATION, 1) == 1
            )
            picture_HWC = _plain_jpeg(file) if plain else None
            return convert(image) if picture_HWC is None else picture_HWC
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: more than {max_pixels / 1e6:,.0f} MP, which is the limit (--max-pixels)") from error
    except UnidentifiedImageError as error:
        reason = "is empty" if file.seek(0, os.SEEK_END) == 0 else "is not an image that can be read"
        raise DataError(f"{name} {reason}") from error
    except MemoryError as error:
        raise DataError(f"{name}: there is not enough memory to decode the image") from error
    except Exception as error:  # Pillow may raise any exception for a damaged file
        reason = str(error) or type(error).__name__
        cut = "truncated" in reason.lower() or "cut" in reason.lower()
        raise DataError(f"{name}: {'cut short' if cut else 'damaged'} ({reason})") from error


@contextlib.contextmanager
def _without_pillow_warnings() -> Iterator[None]:
    """Hide Pillow's warnings of odd metadata, and of large images, which are checked here.

    Several threads decode images at once. `warnings.catch_warnings` would hide what the others warn of too, and after
    two of them had ended in another order than they began, every later warning of the process.
    """
    filters = cast("list[object]", warnings.filters)
    filters.insert(0, _OF_PILLOW)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # after a call of warnings.resetwarnings
            filters.remove(_OF_PILLOW)


def upright(image: Image.Image) -> NDArray[np.uint8]:
    """Convert an open PIL image to (H, W, 3) uint8 RGB as `read_image` does, without changing the PIL image."""
    return _to_rgb(image.copy())


def write_image(path: "str | bytes | os.PathLike[str]", image_HWC: NDArray[np.uint8]) -> None:
    """Write an image file atomically: a file under its final name is always complete.

    Args:
        path: a name ending in .jpg, .jpeg, .png or .webp, in a folder that exists.
        image_HWC: (H, W, 3) uint8 RGB, or (H, W) uint8 or uint16 grey.

    Raises:
        DataError: the folder is missing, the disk is full, or the suffix is not supported. The message names the file.
    """
    try:
        content = encode_image(image_HWC, Path(os.fsdecode(path)).suffix)
    except UsageError as error:
        raise DataError(f"{os.fsdecode(path)}: {error}") from error
    write_file(path, content)


def encode_image(image_HWC: NDArray[np.uint8] | NDArray[np.uint16], suffix: str) -> bytes:
    """Encode an image as the content of a file.

    Args:
        image_HWC: (H, W, 3) uint8 RGB, or (H, W) uint8 or uint16 grey.
        suffix: .jpg, .jpeg, .png or .webp.

    Raises:
        UsageError: the suffix is not supported.
    """
    suffix = suffix.lower()
    if suffix not in _QUALITY:
        raise UsageError(
            f"an image cannot be written as {suffix or 'a file without suffix'}; use {', '.join(_QUALITY)}"
        )
    if suffix in (".jpg", ".jpeg") and image_HWC.ndim == 3:  # OpenCV needs only two thirds of Pillow's time
        bgr_HWC = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR)
        return cv2.imencode(".jpg", bgr_HWC, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY[suffix]["quality"]])[1].tobytes()
    buffer = io.BytesIO()
    form = {".jpg": "JPEG", ".jpeg": "JPEG"}.get(suffix, suffix[1:])
    Image.fromarray(image_HWC).save(buffer, form, **_QUALITY[suffix])
    return buffer.getvalue()


def write_animation(
    path: "str | bytes | os.PathLike[str]", frames: Sequence[NDArray[np.uint8]], *, seconds: float = 0.8
) -> None:
    """Write an endlessly looping animation atomically: a file under its final name is always complete.

    Args:
        path: a name ending in .webp or .gif (see `encode_animation`), in a folder that exists.
        frames: at least one frame, (H, W, 3) uint8 RGB, all of the same size.
        seconds: duration of a frame (default: 0.8). The last frame is shown three times as long.

    Raises:
        DataError: the folder is missing, the disk is full, or the suffix is not supported. The message names the file.
    """
    try:
        content = encode_animation(frames, Path(os.fsdecode(path)).suffix, seconds=seconds)
    except UsageError as error:
        raise DataError(f"{os.fsdecode(path)}: {error}") from error
    write_file(path, content)


def encode_animation(frames: Sequence[NDArray[np.uint8]], suffix: str, *, seconds: float = 0.8) -> bytes:
    """Encode an endlessly looping animation as the content of a file.

    Args:
        frames: at least one frame, (H, W, 3) uint8 RGB, all of the same size.
        suffix: .webp (lossless) or .gif (256 colours per frame).
        seconds: duration of a frame (default: 0.8). The last frame is shown three times as long.

    Raises:
        UsageError: the suffix is not supported.
    """
    suffix = suffix.lower()
    if suffix not in (".webp", ".gif"):
        raise UsageError("an animation is written as .webp or .gif")
    first, *others = [Image.fromarray(frame) for frame in frames]
    milliseconds = round(1000 * seconds)
    durations = [milliseconds] * len(others) + [3 * milliseconds]
    options: _WebpOptions = {"lossless": True} if suffix == ".webp" else {}
    buffer = io.BytesIO()
    first.save(buffer, suffix[1:], save_all=True, append_images=others, duration=durations, loop=0, **options)
    return buffer.getvalue()


class _WebpOptions(TypedDict, total=False):
    lossless: bool


def _plain_jpeg(file: BinaryIO) -> NDArray[np.uint8] | None:
    """Decode a colour JPEG as Pillow does, in two thirds of the time; None if damaged or cut short."""
    file.seek(0)
    content = file.read()
    file.seek(0)
    if not content.endswith(b"\xff\xd9"):  # without the end marker, OpenCV would fill missing rows with grey silently
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


def _to_grey(image: Image.Image) -> NDArray[np.generic]:
    """Return the values of a grey image, (H, W); any other image as RGB, (H, W, 3)."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    grey = image.mode in ("L", "I") or image.mode.startswith("I;16")
    if image.mode == "1":
        return np.array(image.convert("L"))
    return np.array(image if grey and "transparency" not in image.info else image.convert("RGB"))


def _from_deep_grey(values_HW: NDArray[np.generic], *, wide: bool) -> NDArray[np.uint8]:
    """Scale 16-bit integers or floats to 8 bits. If `wide` is False, integers that are all ≤ 255 are 8-bit already."""
    values = values_HW.astype(np.float64)
    if np.issubdtype(values_HW.dtype, np.integer):
        top = 65535 if wide or values.max(initial=0) > 255 else 255
        grey = values * (255 / top)
    else:
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
        grey = np.nan_to_num((values - low) * (255 / (high - low if high > low else 1)))
    return np.repeat(np.clip(np.rint(grey), 0, 255).astype(np.uint8)[..., None], 3, axis=2)
