"""Small networks for the tests of insertion, and a check that an insertion is rejected."""

import pytest
import timm
import torch
from torch import nn

from visionattn.attention import SE, insert
from visionattn.errors import UsageError


class Blocks(nn.Module):
    """A custom network whose stages are Sequentials of blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU())
        self.stage1 = nn.Sequential(*(self.block(8) for _ in range(2)))
        self.down = nn.Conv2d(8, 12, 2, stride=2)
        self.stage2 = nn.Sequential(self.block(12))
        self.head = nn.Linear(12, 3)

    @staticmethod
    def block(width):
        return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x):
        return self.head(self.stage2(self.down(self.stage1(self.stem(x)))).mean((2, 3)))


def resnet(seed=0, **options):
    torch.manual_seed(seed)
    model = timm.create_model("resnet18", zero_init_last=False, **options).eval()
    model.pretrained_cfg["input_size"] = (3, 64, 64)  # small images make the tests fast
    return model


def error_of_insert(model, mechanism=SE, **options):
    """Return the error message of `insert`, which must leave keys and hooks of the model unchanged."""
    keys = list(model.state_dict())
    with pytest.raises(UsageError) as error:
        insert(model, mechanism, **options)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks for module in model.modules())
    return str(error.value)
