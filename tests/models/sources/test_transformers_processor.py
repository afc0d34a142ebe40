"""Inputs of models of transformers equal those of their image processors, built from their default arguments."""

import numpy as np
import pytest
import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from tests.models.compared import ALL, QUICK, worst
from tests.models.transformers_folders import vit
from tests.refusals import refuses
from visionattn.errors import DataError
from visionattn.models.resolve import load_model
from visionattn.models.sources.transformers_processor import preprocess_of_processor

REFUSED = {"donut-swin", "imagegpt", "perceiver", "siglip2", "textnet", "timm_wrapper", "pp_lcnet"}
"""Types whose processor pads to the content, makes tokens of colours, or gives images of several sizes."""

VARIANTS = [
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),  # crop_pct counts below 384
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}, "crop_pct": 0.95, "resample": 3}),
    ("EfficientNetImageProcessor", {"size": {"height": 224, "width": 224}, "resample": 0, "rescale_offset": True}),
    ("ViTImageProcessor", {"size": {"height": 224, "width": 160}}),
    ("ViTImageProcessor", {"do_normalize": False}),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}),
    ("BitImageProcessor", {"size": {"shortest_edge": 256}}),  # DINOv2's
]


NEW = int(transformers.__version__.split(".")[0]) >= 5  # names that end in Pil resize by Pillow; before, all but …Fast


def by_pillow(name):
    return name.endswith("Pil") if NEW else not name.endswith("Fast")


def processors():
    """Return the processor of every type of classifier from its defaults, and some with other values."""
    names = set()
    for kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.keys() - REFUSED:
        known = IMAGE_PROCESSOR_MAPPING_NAMES.get(kind) or {}
        names |= {name for name in (known.values() if NEW else tuple(known)[:1]) if name}
    found = [(name, {}) for name in sorted(names)]
    for name, options in VARIANTS:
        found += [(name, options), (f"{name}Pil", options)] if NEW else [(name, options)]
    return found


@pytest.mark.parametrize("sizes", [QUICK[:1], pytest.param(ALL, marks=pytest.mark.slow)])
def test_the_processors_of_transformers(sizes):
    """Processors that resize by Pillow give the same inputs.

    Each has a twin that resizes tensors, whose bicubic rounds otherwise: single pixels of noise differ by up to 18 of
    255 between the twins. So the mean difference is compared; a shift by one pixel would make it more than 20.
    """
    found = processors()
    assert len(found) > 15
    for name, options in found:
        processor = getattr(transformers, name)(**options)
        if name.startswith("MobileViT") and by_pillow(name):
            # the twins pad an odd number of rows differently; ours pads as the one that the library takes by default
            sizes = [size for size in sizes if size != (224, 225)]
        difference = worst(
            preprocess_of_processor(processor),
            lambda x: processor(images=[x], return_tensors="np")["pixel_values"][0],  # noqa: B023
            sizes,
            np.max if by_pillow(name) else np.mean,
        )
        assert difference <= (0.01 if by_pillow(name) else 0.6), (name, options)


def test_a_processor_that_prepares_images_otherwise_is_refused():
    with pytest.raises(DataError, match="cannot copy; give --size"):
        preprocess_of_processor(transformers.DonutImageProcessor())
    with pytest.raises(DataError, match=r"cannot do \(the size of its inputs depends on the image\)"):
        preprocess_of_processor(transformers.CLIPImageProcessor(do_center_crop=False))
    with pytest.raises(DataError, match=r"ConvNextImageProcessor of this model does what .* cannot do"):
        preprocess_of_processor(transformers.ConvNextImageProcessor(size={"height": 224, "width": 224}))


def test_a_folder_without_a_processor_needs_a_preprocessing(tmp_path):
    vit(tmp_path, processor=False)
    refuses(DataError, "has no image processor .*; give --size, --mean and --std", load_model, f"hf:{tmp_path}")
