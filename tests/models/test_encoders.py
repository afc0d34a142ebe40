"""Test the encoders of glimpses."""

from functools import partial

import pytest

from tests.models.glimpses import images, make, touched
from visionattn.attention import Retina
from visionattn.models import ConvEncoder, TimmEncoder


@pytest.mark.parametrize(
    ("encoder", "retina", "chans"),
    [
        (ConvEncoder, Retina((5, 8), scales=2), 3),
        (partial(ConvEncoder, widths=(4, 6, 8)), Retina(7), 1),
        (partial(TimmEncoder, backbone="resnet10t"), Retina(32, scales=3), 3),
    ],
    ids=["conv", "conv on grey images", "timm"],
)
def test_encoders_accept_any_patch_size(encoder, retina, chans):
    network = make(encoder=encoder, retina=retina, in_chans=chans)
    logits = network(images(2, chans, 40, 33))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert {name for name in touched(network) if name.startswith("encoder")}
