"""All mechanisms that are built from a number of channels and keep the shape, and helpers to test them."""

import inspect
import math
from functools import partial

import torch

from visionattn import attention

OTHER_INTERFACES = "AttentionGate", "AttentionHead", "AttentionPool"
"""Soft attention with other arguments or output shapes; the classes named …Score are excluded too."""

MECHANISMS = {
    name: kind
    for name in attention.__all__
    if isinstance(kind := getattr(attention, name), type)
    and kind.__module__.startswith("visionattn.attention.soft.")
    and "channels" in inspect.signature(kind).parameters
    and name not in OTHER_INTERFACES
    and not name.endswith("Score")
}


def seeded(mechanism, channels, **options):
    """Make a mechanism in float64 and evaluation mode with random weights and statistics."""
    torch.manual_seed(0)
    return randomised(mechanism(channels, **options)).double().eval()


def randomised(module):
    """Set all weights and statistics to random values; variances are positive."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1 if "running_var" in name else torch.randn_like(tensor))
    return module


def weights(module):
    """Return the weights by their names inside timm's module, or inside the mechanism."""
    return {name.removeprefix("attention."): tensor for name, tensor in module.state_dict().items()}


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def normalised(value, w, name):
    """Apply batch normalisation with the running statistics."""
    value = (value - w[f"{name}.running_mean"]) / (w[f"{name}.running_var"] + 1e-5).sqrt()
    return value * w[f"{name}.weight"] + w[f"{name}.bias"]


image = partial(torch.randn, dtype=torch.float64)
