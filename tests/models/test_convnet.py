"""Test the small residual network: its grid, its gates and its pooling."""

import pytest
import torch

from tests.refusals import refuses
from visionattn.models import ConvNet


def test_convnet_has_the_documented_grid_and_gates():
    from visionattn.attention import CBAM
    from visionattn.capture import capture

    model = ConvNet(5, widths=(16, 32), depth=2, attention=lambda channels: CBAM(channels, reduction=4)).eval()
    with torch.no_grad(), capture(model) as records:
        assert model(torch.randn(2, 3, 64, 48)).shape == (2, 5)
    spatial = [record.grid for record in records.gates if record.kind == "spatial_gate"]
    assert spatial == [(16, 12), (16, 12), (8, 6), (8, 6)]
    refuses(ValueError, "at least one class", ConvNet, 0)
    refuses(ValueError, "pool must be", ConvNet, 5, pool=0.5)


@pytest.mark.parametrize("pool", [1.0, 2.0, 3.5])
def test_convnet_pools_by_the_generalised_mean(pool):
    model = ConvNet(5, widths=(16,), pool=pool).eval()
    x = torch.rand(2, 3, 24, 16)
    features = model.blocks(model.stem(x)).detach().double()
    pooled = torch.zeros(2, 16, dtype=torch.float64)
    for image in range(2):
        for channel in range(16):
            values = [max(1e-5, float(value)) for value in features[image, channel].flatten()]
            pooled[image, channel] = (sum(value**pool for value in values) / len(values)) ** (1 / pool)
    torch.testing.assert_close(model(x), model.head(pooled.float()), atol=1e-4, rtol=1e-4)
