"""Choices and weights that differ have fingerprints that differ."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.overlays.folder.exports import Tiny, bright, other_weights
from visionattn.data.placement import Preprocess
from visionattn.drawing.rendering import Style
from visionattn.maps.cam import GradCAM
from visionattn.overlays.folder.fingerprint import describe, weights_hash


def test_choices_that_differ_are_described_differently_and_in_every_process_alike():
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
