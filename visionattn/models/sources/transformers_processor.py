"""The preprocessing of transformers' image processors, as a `Preprocess`."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from visionattn.data import Preprocess, crop_fraction_of
from visionattn.errors import DataError, first_line
from visionattn.models.sources.transformers_source import import_transformers, loading_options, quiet, source_of


def transformers_preprocess(name: str) -> Preprocess:
    """Return the preprocessing of a model's image processor; the inputs equal the processor's within 1/255.

    Raises:
        DataError: there is no image processor, or it does what `Preprocess` cannot do.
    """
    source = source_of(name)
    transformers = import_transformers()
    try:
        with quiet(transformers, source):
            # Pillow's resizing, as visionattn's; torchvision's bicubic of tensors rounds otherwise in single pixels
            pillow = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) >= 5 else {"use_fast": False}
            processor = transformers.AutoImageProcessor.from_pretrained(source, **pillow, **loading_options(source))
    except Exception as error:
        raise DataError(
            f"{name} has no image processor that can be loaded ({first_line(error)}); "
            "give --size, --mean and --std (preprocess in Python)"
        ) from error
    return preprocess_of_processor(processor, name)


def preprocess_of_processor(processor: Any, name: str = "") -> Preprocess:
    """Convert an image processor of transformers to a `Preprocess`, and compare both on two pictures.

    Processors of detectors that keep the shape of each image (DETR: shorter side 800 pixels, longer side at most 1,333)
    are not compared: here all inputs have one size, into which each image is letterboxed with the mean colour.

    Raises:
        DataError: the processor does what `Preprocess` cannot do, or their inputs differ by more than 0.1 of 255 in the
            mean over the pixels. Inputs of processors that resize by Pillow are equal.
    """
    kind = type(processor).__name__
    name = name or "this model"
    remedy = "give --size, --mean and --std (preprocess in Python)"
    random = np.random.default_rng(0)
    pictures = []
    for height, width in ((61, 97), (150, 118)):
        coarse = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        pictures.append(np.kron(coarse, np.ones((9, 9, 1), np.uint8))[:height, :width])
    try:
        preprocess = _converted(processor)
        answers = [np.asarray(processor(images=[image], return_tensors="np")["pixel_values"])[0] for image in pictures]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"the {kind} of {name} does what visionattn's preprocessing cannot do ({error}); {remedy}"
        ) from error
    if preprocess.fit == "letterbox":
        return preprocess
    for image, theirs in zip(pictures, answers, strict=True):
        ours = preprocess(image)[0]
        std = np.asarray(preprocess.std)[:, None, None]
        if theirs.shape != ours.shape or np.abs((theirs - ours) * std).mean() > 0.1 / 255:
            raise DataError(f"the {kind} of {name} prepares images in a way that visionattn cannot copy; {remedy}")
    return preprocess


def _converted(processor: Any) -> Preprocess:
    """Convert the attributes of a processor.

    The steps are: resize, take the centre, rescale, subtract the mean and divide by the standard deviation.
    """
    from PIL import Image

    size = _sides(processor.size)
    short = size.get("shortest_edge")
    frame: int | None
    if not getattr(processor, "do_resize", True):
        raise ValueError("it does not resize")
    detects = hasattr(processor, "post_process_object_detection")
    keeps_shape = detects and size.keys() == {"shortest_edge", "longest_edge"}
    if not keeps_shape and {"longest_edge", "max_height", "max_width"} & size.keys():
        raise ValueError(f"it resizes to {size}")
    kind = type(processor).__name__
    if keeps_shape:
        fit, frame, height, width = "letterbox", None, size["shortest_edge"], size["longest_edge"]
    elif "ConvNext" in kind and short is not None:
        height = width = short
        fit, frame = ("crop", int(short / processor.crop_pct)) if short < 384 else ("stretch", short)
    elif "PoolFormer" in kind and short is not None and processor.crop_pct is not None:
        height, width = _crop(processor)
        fit, frame = "crop", int(short / processor.crop_pct)
    elif "Levit" in kind and short is not None:
        height, width = _crop(processor)
        fit, frame = "crop", int((256 / 224) * short)
    elif short is not None:
        fit, frame = "crop", short
        height, width = _crop(processor) if getattr(processor, "do_center_crop", False) else (0, 0)
        if not height:
            raise ValueError("the size of its inputs depends on the image")
    else:
        fit, frame = "stretch", None
        height, width = size["height"], size["width"]
        if getattr(processor, "do_center_crop", False):
            frame = height
            if height != width:
                raise ValueError("it takes the centre of a frame that is not square")
            height, width = _crop(processor)
    scale = 255 * (processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0)
    offset = 1.0 if getattr(processor, "rescale_offset", False) or getattr(processor, "offset", False) else 0.0
    normalises = getattr(processor, "do_normalize", hasattr(processor, "image_mean"))
    mean = _three(processor.image_mean) if normalises else (0.0,) * 3
    std = _three(processor.image_std) if normalises else (1.0,) * 3
    if getattr(processor, "include_top", False):  # EfficientNet divides twice
        std = tuple(value * value for value in std) if normalises else _three(processor.image_std)
    interpolation = Image.Resampling(int(processor.resample)).name.lower()
    return Preprocess(
        size=height if height == width else (height, width),
        fit=fit,  # type: ignore[arg-type]  # one of two words
        crop_fraction=1.0 if frame is None else crop_fraction_of(height, frame),
        interpolation=interpolation,  # type: ignore[arg-type]  # Pillow's names are those of Preprocess
        mean=tuple((value + offset) / scale for value in mean),
        std=tuple(value / scale for value in std),
        rounding="down",
        channel_order="bgr" if getattr(processor, "do_flip_channel_order", False) else "rgb",
    )


def _sides(size: object) -> dict[str, int]:
    """Return the sides that a processor's size names; an int means a square."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    if size is None:
        raise ValueError("it has no size")
    pairs = dict(size).items() if isinstance(size, Mapping) else vars(size).items()
    return {key: int(value) for key, value in pairs if value}


def _crop(processor: Any) -> tuple[int, int]:
    sides = _sides(processor.crop_size)
    return sides["height"], sides["width"]


def _three(values: Any) -> tuple[float, ...]:
    numbers = (float(values),) * 3 if isinstance(values, (int, float)) else tuple(map(float, values))
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"it normalises by {values}")
    return numbers
