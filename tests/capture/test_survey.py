"""Surveys report attention that cannot be recorded, and a model that has changed is surveyed again."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture import models
from tests.capture.homemade import HomemadeAttention
from tests.capture.models import kept
from visionattn.capture import FullAttention, capture
from visionattn.errors import MapWarning, UsageError


def test_the_report_lists_missed_modules_and_records():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit, self.mine = models.vit(), HomemadeAttention()

        def forward(self, images):
            return self.vit(images), self.mine(images)

    net = Net()
    with torch.no_grad(), capture(net) as records:
        net(models.pictures())
    assert records.missed == ["mine"]
    assert len(records) == 3
    assert "1 look like attention but did not attend\n  mine" in records.report()
    assert "  vit.blocks.0.attn: self, grid 4×4, 3 heads" in repr(records)


def test_a_softmax_over_channels_is_reported_and_not_recorded_as_attention():
    model = models.randomised(timm.create_model("xcit_nano_12_p16_224", depth=1, cls_attn_layers=1))
    with torch.no_grad(), capture(model, FullAttention()) as records:
        model(models.pictures(64))
    assert [record.name for record in records.attention] == ["cls_attn_blocks.0.attn"]
    assert records.other == {"blocks.0.attn": "it attends over channels or learned tokens, not over positions"}
    assert "blocks.0.attn: it attends over channels" in records.report()


def test_attention_with_unknown_positions_is_reported():
    class ThroughNumPy(nn.Module):
        """Convert tokens to NumPy and back, so that their positions cannot be followed."""

        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 8, 8)

        def forward(self, images):
            x = torch.from_numpy(self.embed(images).detach().numpy()).flatten(2).mT
            return F.scaled_dot_product_attention(x, x, x).mean(1)

    net = nn.Sequential(ThroughNumPy())
    with pytest.raises(UsageError, match="0: the positions of its keys are not known"), capture(net):
        net(models.pictures(32))


def test_attention_that_appears_after_the_survey_is_reported_and_surveyed_next_time():
    class OneOrTwoCalls(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 8, 8)

        def forward(self, images):
            x = self.embed(images).flatten(2).mT
            for _ in range(times[0]):
                x = x + F.scaled_dot_product_attention(x, x, x)
            return x.mean(1)

    times = [1]  # outside of the model, so a change of this list does not invalidate the cached survey
    model, images = OneOrTwoCalls(), models.pictures(32)
    assert len(kept(model, images, FullAttention())) == 1
    times[0] = 2
    warns = pytest.warns(MapWarning, match="the records lack attention.* did not attend in this way")
    with warns, torch.no_grad(), capture(model, FullAttention()) as records:
        model(images)
    assert len(records) == 1
    assert "it did not attend in this way when the model was surveyed" in records.report()
    assert len(kept(model, images, FullAttention())) == 2


def test_randomly_dropped_tokens_in_training_are_reported_and_not_recorded():
    model, images = models.vit(patch_drop_rate=0.5), models.pictures()
    assert len(kept(model, images, FullAttention())) == 3
    with pytest.raises(UsageError, match=r"blocks\.0\.attn has 9 keys, but it had 17"), capture(model.train()):
        model(images)
    assert len(kept(model.eval(), images, FullAttention())) == 3


def test_another_image_size_is_surveyed_again():
    model = models.vit(dynamic_img_size=True)
    with torch.no_grad(), capture(model, FullAttention()) as records:
        model(models.pictures(64))
        model(models.pictures((32, 96)))
    assert [record.grid for record in records] == [(4, 4)] * 3 + [(2, 6)] * 3
