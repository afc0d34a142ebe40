"""Pictures of records in a notebook."""

import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tests.capture.models import swin, vit
from visionattn.attention import CBAM, Retina, insert
from visionattn.capture import ClassRow, FullAttention, HeadMean, NoWeights, capture
from visionattn.capture import records as pictures
from visionattn.capture.records import Record
from visionattn.maps import Rollout


def seen(model, keep=None, images=None):
    with torch.no_grad(), capture(model, keep) as records:
        model(torch.rand(2, 3, 64, 64) if images is None else images)
    return records


def test_a_record_shows_every_head_of_every_image():
    (*_, last) = seen(vit(), FullAttention())
    maps_BHhw = pictures._maps(last)
    expected = last.weights[:, 0, :, 0, 1:].reshape(2, 3, 4, 4)  # the class token's rows
    torch.testing.assert_close(maps_BHhw, expected)
    of_rows = pictures._maps(seen(vit(), ClassRow(), images=torch.zeros(2, 3, 64, 64))[-1])
    torch.testing.assert_close(
        of_rows, pictures._maps(seen(vit(), FullAttention(), images=torch.zeros(2, 3, 64, 64))[-1])
    )
    mean = pictures._maps(seen(vit(), HeadMean(), images=torch.zeros(2, 3, 64, 64))[-1])
    torch.testing.assert_close(mean[:, 0], of_rows.mean(1))


def test_colours_show_where_the_weight_lies():
    weights_1114 = torch.tensor([0.1, 0.2, 0.0, 0.7])[None, None, None]
    tokens = seen(vit(img_size=32), images=torch.rand(1, 3, 32, 32))[0].keys
    with_class = torch.cat([torch.zeros(1, 1, 1, 1), weights_1114], 3)
    picture = pictures.of_record(Record("a", "self", (2, 2), 1, 1, tokens, tokens, with_class, 0))
    light = picture.astype(int).sum(2)
    high, wide = np.argwhere(light > 500).mean(0)
    box = np.argwhere((picture != picture[-1, -1]).any(2) & (np.arange(len(picture)) > 40)[:, None])
    assert high > box[:, 0].mean() * 0.9
    assert wide > box[:, 1].mean()


class Looker(nn.Module):
    """Looks three times, further to the right each time."""

    def __init__(self):
        super().__init__()
        self.retina = Retina(8, scales=2)

    def forward(self, x_BCHW):
        view = self.retina.view(x_BCHW)
        return [self.retina.look(view, torch.full((len(x_BCHW), 1, 2), x)) for x in (-0.5, 0.0, 0.5)]


def gated():
    model = timm.create_model("test_resnet").eval()
    insert(model, CBAM, at="stages")
    return seen(model)


def test_gates_glimpses_windows_and_maps_have_pictures():
    records = gated()
    shown = {record.kind: record._repr_png_() for record in records}
    assert set(shown) == {"channel_gate", "spatial_gate"}
    looked = seen(Looker())
    everything = [*shown.values(), records._repr_png_(), looked[0]._repr_png_()]
    everything += [record._repr_png_() for record in seen(swin(), FullAttention(), images=torch.rand(2, 3, 32, 32))]
    everything.append(Rollout()(vit(), torch.rand(2, 3, 64, 64))._repr_png_())
    for content in everything:
        with Image.open(io.BytesIO(content)) as picture:
            assert np.asarray(picture.convert("L")).std() > 10


def test_records_without_weights_show_text():
    records = seen(vit(), NoWeights())
    assert records._repr_png_() is None
    assert records[0]._repr_png_() is None
    assert repr(records[0]) == "Record(blocks.0.attn: self, grid 4×4, 3 heads, nothing kept)"


@pytest.mark.parametrize("count", [1, 40])
def test_batches_of_any_size_have_pictures(count):
    record = seen(vit(), images=torch.rand(count, 3, 64, 64))[-1]
    with Image.open(io.BytesIO(record._repr_png_())) as picture:
        assert picture.height < 1000
