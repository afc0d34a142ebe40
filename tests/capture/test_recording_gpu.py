"""The attention that is recorded from the fused kernels of a GPU equals the attention on the CPU."""

import pytest
import torch

from tests.capture import models
from visionattn.capture import FullAttention, capture

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_recorded_attention_of_fused_kernels_equals_that_on_the_cpu(dtype, tolerance, gpu):
    model, images = models.vit(), models.pictures()
    with torch.no_grad(), capture(model, FullAttention()) as expected:
        logits = model(images)
    model, images = model.to(gpu), images.to(gpu)
    with torch.no_grad(), torch.autocast(gpu.type, dtype, enabled=dtype != torch.float32):
        plain = model(images)
        with capture(model, FullAttention()) as records:
            watched = model(images)
    torch.testing.assert_close(watched, plain, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(watched.float().cpu(), logits, atol=10 * tolerance, rtol=10 * tolerance)
    assert len(records) == len(expected)
    for record, reference in zip(records, expected, strict=True):
        assert (record.weights.float().cpu() - reference.weights).abs().mean() < tolerance / 3
