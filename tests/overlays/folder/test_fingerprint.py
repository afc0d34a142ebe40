"""Different choices and weights have different fingerprints, and a changed drawing is noticed."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.overlays.folder import golden
from tests.overlays.folder.exports import Tiny, bright, other_weights
from visionattn.data.placement import Preprocess
from visionattn.drawing.rendering import Style
from visionattn.maps.cam import GradCAM
from visionattn.overlays.folder.fingerprint import describe, weights_hash


def test_different_choices_have_different_descriptions_equal_in_every_process():
    values = [
        np.zeros(2), np.ones(2), np.float32(0.5), np.float32(0.25), Path("a"), Path("b"), partial(bright, contrast=1),
        partial(bright, contrast=2), bright, GradCAM(), GradCAM(layer="conv"), torch.zeros(2), Tiny(), other_weights(),
        {"a": 1}, {"a": 2}, [1, 2], None, True, "a", Style(), Style(alpha=0.5), Preprocess(8), Preprocess(9), {1}, {2},
    ]  # fmt: skip
    described = [json.dumps(describe(value)) for value in values]
    assert len(set(described)) == len(values)
    assert not [text for text in described if "0x" in text]  # an address would differ next time


def test_weights_of_every_kind_are_hashed():
    class Buffers(nn.Module):
        def __init__(self, *tensors):
            super().__init__()
            for number, tensor in enumerate(tensors):
                self.register_buffer(f"b{number}", tensor)

    kinds = [torch.zeros(0), torch.tensor(3), torch.tensor([True]), torch.ones(2).bfloat16(), torch.ones(3, 2).T]
    hashes = [weights_hash(Buffers(kind)) for kind in kinds]
    assert len(set(hashes)) == len(kinds)
    assert weights_hash(Buffers(torch.ones(3, 2).T.contiguous())) == hashes[-1]


def test_outputs_look_like_the_golden_image():
    assert golden.FILE.stat().st_size < 60_000
    changed = golden.differences(golden.outputs())
    assert not changed, (
        f"the drawing has changed ({'; '.join(changed)}): raise fingerprint.VERSION, so that earlier outputs are made "
        "again, and write the golden image again by `python -m tests.overlays.folder.golden`"
    )


@pytest.mark.parametrize("change", [{"alpha": 0.6}, {"colormap": "magma"}, {"contours": (0.7,)}, {"caption": False}])
def test_golden_image_shows_a_change_of_the_drawing(change):
    assert golden.differences(golden.outputs(Style(**{"contours": (0.5,), "caption": True, **change})))
