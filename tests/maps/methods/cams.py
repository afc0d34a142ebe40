"""Networks for the tests of class activation maps, and a layer's output and gradient by plain autograd."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.capture import models

close = torch.testing.assert_close


class Convnet(nn.Module):
    """Two convolutions at the resolution of the image, then a nonlinear head for four classes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.pool, self.head = nn.AdaptiveAvgPool2d(3), nn.Linear(45, 4)

    def forward(self, images):
        x = self.second(self.act(self.first(images)))
        return self.head(self.pool(F.silu(x)).flatten(1))


def convnet():
    model = models.randomised(Convnet())
    with torch.no_grad():
        # pytorch-grad-cam adds small constants to denominators; large gradients make these constants negligible
        model.head.weight.mul_(1000)
    return model


def resnet():
    model = models.resnet()
    with torch.no_grad():
        model.fc.weight.mul_(1000)
    return model


def channels_first(tokens):
    """Drop the class token, which comes first, and arrange the patch tokens as a (B, C, 4, 4) map."""
    return tokens[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)


SETTINGS = {  # model, image size, layer, function from tokens to a map
    "convnet": (convnet, (20, 28), "second", None),
    "convnet, before an in-place activation": (convnet, (20, 28), "first", None),
    "convnet, after an in-place activation": (convnet, (20, 28), "act", None),
    "resnet": (resnet, (96, 64), "layer4", None),
    "resnet, early": (resnet, (96, 64), "layer2.0", None),
    "vit": (models.vit, (64, 64), "blocks.2.norm1", channels_first),
    "vit, early": (models.vit, (64, 64), "blocks.0", channels_first),
}


def values_and_gradient(setting, score):
    """Return the layer's output and its gradient, (B, C, h, w), by plain autograd in float64."""
    make, size, layer, reshape = SETTINGS[setting]
    model, outputs = make().double(), []

    def replace_by_clone(module, args, out):
        outputs.append(out)
        return out.clone()

    model.get_submodule(layer).register_forward_hook(replace_by_clone)
    output = model(models.pictures(size).double())
    gradient = torch.autograd.grad(score(output).sum(), outputs[0])[0]
    return [x.detach() if reshape is None else reshape(x.detach()) for x in (outputs[0], gradient)]


def assert_close_to_scale(found, expected, tolerance=1e-4):
    scale = float(expected.abs().max())
    assert scale > 0
    close(found.double() / scale, expected.double() / scale, atol=tolerance, rtol=0)
