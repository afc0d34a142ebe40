"""Every mechanism under the one interface, and how the tests build them."""

import math
from functools import partial

import torch

from visionattn import attention

MECHANISMS = {
    name: getattr(attention, name)
    for name in (
        "SE", "EffectiveSE", "ECA", "CircularECA", "WideECA", "GCT", "FcaNet", "GatherExcite", "LSKA",
        "CoordinateAttention", "SimpleCoordinateAttention", "ELA", "StripAttention", "CBAM", "LightCBAM", "BAM",
        "SimAM", "TripletAttention", "EMA", "GlobalContext", "GlobalContextGate", "DoubleAttention", "Lambda",
        "NonLocal", "DualAttention", "BottleneckAttention", "HaloAttention", "BilinearAttention", "SelectiveKernel",
        "SplitAttention",
    )
}  # fmt: skip


def seeded(mechanism, channels, **options):
    """A mechanism in float64 and evaluation mode whose every weight and statistic is random."""
    torch.manual_seed(0)
    return stirred(mechanism(channels, **options)).double().eval()


def stirred(module):
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1 if "running_var" in name else torch.randn_like(tensor))
    return module


def weights(module):
    """The weights by their names inside timm's module, or ours."""
    return {name.removeprefix("attention."): tensor for name, tensor in module.state_dict().items()}


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def normalised(value, w, name):
    """Batch normalisation with what it has seen."""
    value = (value - w[f"{name}.running_mean"]) / (w[f"{name}.running_var"] + 1e-5).sqrt()
    return value * w[f"{name}.weight"] + w[f"{name}.bias"]


image = partial(torch.randn, dtype=torch.float64)
