"""Test the penalty of adaptive spans."""

import pytest
import torch
import torch.nn.functional as F

from tests.capture import models
from visionattn.attention import AdaptiveSpan, swap_attention
from visionattn.tasks import Classification


def test_loss_includes_the_mean_span_times_span_penalty():
    network = models.vit()
    swap_attention(network, lambda heads: AdaptiveSpan(heads, max_span=3, init=0.4))
    task = Classification(network, span_penalty=2.5)
    task.prepare(None, 7)
    task.log = lambda *args, **options: None
    batch = {"image": models.pictures(), "label": torch.tensor([1, 5])}
    mean_span = 0.4 * 3
    expected = F.cross_entropy(network(batch["image"]), batch["label"]) + 2.5 * mean_span
    torch.testing.assert_close(task.training_step(batch, 0), expected)
    with pytest.raises(ValueError, match="span_penalty must be ≥ 0, got -1"):
        Classification(network, span_penalty=-1)
