"""Errors of captures name the cause, and leave the model unchanged."""

import pytest
import torch
from torch import nn

from tests.capture import models
from visionattn.capture import capture
from visionattn.errors import UsageError


def test_capture_of_a_model_without_attention_is_an_error():
    model = models.resnet()
    with (
        pytest.raises(UsageError, match="nothing in this ResNet attends; methods that fit: gradcam"),
        torch.no_grad(),
        capture(model),
    ):
        model(models.pictures())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_model_with_a_scripted_part_is_recorded():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit, self.head = models.vit(), torch.jit.script(nn.Sequential(nn.Linear(7, 7), nn.ReLU()))

        def forward(self, images):
            return self.head(self.vit(images))

    net = Net().eval()
    before = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), capture(net) as records:
        net(models.pictures())
    assert len(records) == 3
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_the_error_for_a_wrong_layer_names_the_nearest_and_leaves_the_model_unchanged():
    model, images = models.vit(), models.pictures()
    before = models.state_of(model)
    with (
        torch.no_grad(),
        pytest.raises(UsageError, match=r"Nearest: blocks\.1\.attn"),
        capture(model, layers=["bloks.1.attn"]),
    ):
        model(images)
    models.assert_same_state(before, models.state_of(model))


def test_the_error_for_a_wrong_name_of_a_record_names_the_nearest():
    model = models.vit()
    with torch.no_grad(), capture(model) as records:
        model(models.pictures())
    with pytest.raises(UsageError, match=r"nothing attends in 'blocks\.2\.at'\. Nearest: blocks\.2\.attn"):
        records["blocks.2.at"]


def test_capture_of_an_empty_batch_gives_empty_weights():
    model = models.vit()
    with torch.no_grad(), capture(model) as records:
        assert model(torch.zeros(0, 3, 64, 64)).shape == (0, 7)
    assert [record.weights.shape for record in records] == [(0, 1, 3, 17)] * 3
    with torch.no_grad(), capture(model) as records:  # the survey of the empty batch is also right for other batches
        model(models.pictures())
    assert [record.grid for record in records] == [(4, 4)] * 3
