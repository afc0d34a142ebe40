"""What a survey finds: never silently empty, and made anew where the model has changed."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture import models
from tests.capture.homemade import HomemadeAttention
from tests.capture.models import kept
from visionattn.capture import Full, capture
from visionattn.errors import UsageError


def test_what_was_missed_is_named_beside_what_was_seen():
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
    assert "1 look like attention and were not seen to attend\n  mine" in records.report()
    assert "  vit.blocks.0.attn: self, grid 4×4, 3 heads" in repr(records)


def test_a_softmax_over_channels_is_named_and_is_not_taken_for_attention():
    model = models.stirred(timm.create_model("xcit_nano_12_p16_224", depth=1, cls_attn_layers=1))
    with torch.no_grad(), capture(model, Full()) as records:
        model(models.pictures(64))
    assert [record.name for record in records.attention] == ["cls_attn_blocks.0.attn"]
    assert records.other == {"blocks.0.attn": "it attends over channels or learned tokens, not over positions"}
    assert "blocks.0.attn: it attends over channels" in records.report()


def test_queries_and_keys_of_unknown_places_are_named():
    class Shuffled(nn.Module):
        """Numpy hides where its tokens come from."""

        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 8, 8)

        def forward(self, images):
            x = torch.from_numpy(self.embed(images).detach().numpy()).flatten(2).mT
            return F.scaled_dot_product_attention(x, x, x).mean(1)

    net = nn.Sequential(Shuffled())
    with pytest.raises(UsageError, match="0: the positions of its keys are not known"), capture(net):
        net(models.pictures(32))


def test_attention_that_appears_only_later_is_reported_and_then_surveyed():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.twice = nn.Conv2d(3, 16, 8, 8), False

        def forward(self, images):
            x = self.embed(images).flatten(2).mT
            for _ in range(1 + self.twice):
                x = x + F.scaled_dot_product_attention(x, x, x)
            return x.mean(1)

    model, images = Fickle(), models.pictures(32)
    assert len(kept(model, images, Full())) == 1
    model.twice = True
    with torch.no_grad(), capture(model, Full()) as records:
        model(images)
    assert len(records) == 1
    assert "not seen to attend when the model was surveyed" in records.report()
    assert len(kept(model, images, Full())) == 2


def test_tokens_that_are_dropped_by_chance_while_training_are_reported_and_put_nowhere():
    model, images = models.vit(patch_drop_rate=0.5), models.pictures()
    assert len(kept(model, images, Full())) == 3
    with pytest.raises(UsageError, match=r"blocks\.0\.attn now has 9 keys, and had 17"), capture(model.train()):
        model(images)
    assert len(kept(model.eval(), images, Full())) == 3


def test_another_image_size_is_surveyed_anew():
    model = models.vit(dynamic_img_size=True)
    with torch.no_grad(), capture(model, Full()) as records:
        model(models.pictures(64))
        model(models.pictures((32, 96)))
    assert [record.grid for record in records] == [(4, 4)] * 3 + [(2, 6)] * 3
