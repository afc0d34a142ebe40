"""Pictures of records in a notebook."""

import io
import itertools

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tests.capture.models import swin, vit
from tests.refusals import refuses
from visionattn.attention import CBAM, Retina, insert
from visionattn.capture import ClassRow, FullAttention, HeadMean, NoWeights, PatchRow, capture
from visionattn.capture import records as records_module
from visionattn.capture.records import Record
from visionattn.errors import UsageError
from visionattn.maps import Rollout


def records_of(model, keep=None, images=None):
    with torch.no_grad(), capture(model, keep) as records:
        model(torch.rand(2, 3, 64, 64) if images is None else images)
    return records


def test_a_record_shows_every_head_of_every_image():
    (*_, last) = records_of(vit(), FullAttention())
    maps_BHhw = records_module._maps(last)
    expected = last.weights[:, 0, :, 0, 1:].reshape(2, 3, 4, 4)  # the class token's rows
    torch.testing.assert_close(maps_BHhw, expected)
    of_rows = records_module._maps(records_of(vit(), ClassRow(), images=torch.zeros(2, 3, 64, 64))[-1])
    torch.testing.assert_close(
        of_rows, records_module._maps(records_of(vit(), FullAttention(), images=torch.zeros(2, 3, 64, 64))[-1])
    )
    mean = records_module._maps(records_of(vit(), HeadMean(), images=torch.zeros(2, 3, 64, 64))[-1])
    torch.testing.assert_close(mean[:, 0], of_rows.mean(1))


def test_the_brightest_pixels_lie_at_the_largest_weight():
    weights_1114 = torch.tensor([0.1, 0.2, 0.0, 0.7])[None, None, None]
    tokens = records_of(vit(img_size=32), images=torch.rand(1, 3, 32, 32))[0].keys
    with_class = torch.cat([torch.zeros(1, 1, 1, 1), weights_1114], 3)
    picture = records_module.of_record(Record("a", "self", (2, 2), 1, 1, tokens, tokens, with_class, 0))
    brightness = picture.astype(int).sum(2)
    row, column = np.argwhere(brightness > 500).mean(0)
    heatmap_cells = np.argwhere((picture != picture[-1, -1]).any(2) & (np.arange(len(picture)) > 40)[:, None])
    assert row > heatmap_cells[:, 0].mean() * 0.9
    assert column > heatmap_cells[:, 1].mean()


class ThreeGlimpses(nn.Module):
    """Three glimpses, each further to the right than the one before."""

    def __init__(self):
        super().__init__()
        self.retina = Retina(8, scales=2)

    def forward(self, x_BCHW):
        view = self.retina.view(x_BCHW)
        return [self.retina.look(view, torch.full((len(x_BCHW), 1, 2), x)) for x in (-0.5, 0.0, 0.5)]


def records_of_gates():
    model = timm.create_model("test_resnet").eval()
    insert(model, CBAM, at="stages")
    return records_of(model)


def test_records_of_every_kind_and_heatmaps_have_pictures():
    records = records_of_gates()
    png_of_kind = {record.kind: record._repr_png_() for record in records}
    assert set(png_of_kind) == {"channel_gate", "spatial_gate"}
    glimpses = records_of(ThreeGlimpses())
    pngs = [*png_of_kind.values(), records._repr_png_(), glimpses[0]._repr_png_()]
    pngs += [record._repr_png_() for record in records_of(swin(), FullAttention(), images=torch.rand(2, 3, 32, 32))]
    pngs.append(Rollout()(vit(), torch.rand(2, 3, 64, 64))._repr_png_())
    for png in pngs:
        with Image.open(io.BytesIO(png)) as picture:
            assert np.asarray(picture.convert("L")).std() > 10  # the picture is not of one colour


def test_records_without_weights_show_text():
    records = records_of(vit(), NoWeights())
    assert records._repr_png_() is None
    assert records[0]._repr_png_() is None
    assert repr(records[0]) == "Record(blocks.0.attn: self, grid 4×4, 3 heads, nothing kept)"


@pytest.mark.parametrize("count", [1, 40])
def test_the_picture_of_a_large_batch_is_not_too_high(count):
    record = records_of(vit(), images=torch.rand(count, 3, 64, 64))[-1]
    with Image.open(io.BytesIO(record._repr_png_())) as picture:
        assert picture.height < 1000


@pytest.mark.parametrize("row", [None, (1, 2)])
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_wee_patch16_reg1_gap_256", "swin_tiny_patch4_window7_224"]
)
def test_maps_equal_a_loop_over_the_cells(name, row):
    torch.manual_seed(0)
    size = (56, 84) if name.startswith("swin") else (48, 64)
    model = timm.create_model(name, img_size=size).eval()
    keep = ClassRow() if row is None else PatchRow(*row)
    images = torch.randn(2, 3, *size)
    with torch.no_grad(), capture(model, keep, layers=[1]) as records:
        model(images)
    record = records[1]
    maps = record.maps()
    assert maps.shape == (2, record.heads, *record.grid)
    for image, head, window in itertools.product(range(2), range(record.heads), range(record.weights.shape[1])):
        for key, cell in enumerate(record.keys.index_WN[window].tolist()):
            if cell >= 0:
                found = maps[image, head, cell // record.grid[1], cell % record.grid[1]]
                torch.testing.assert_close(found, record.weights[image, window, head, key])


def test_maps_of_a_record_without_weights_are_refused():
    (first, *_) = records_of(vit(), NoWeights())
    refuses(UsageError, "no weights of blocks.0.attn were kept; name the module", first.maps)
