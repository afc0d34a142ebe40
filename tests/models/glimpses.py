"""A small glimpse network."""

from functools import partial

import torch

from visionattn.attention import Gaussian, Retina
from visionattn.models import GlimpseNetwork, MLPEncoder

SMALL = {"hidden_size": 16, "glimpse_features": 12, "where_features": 8, "num_glimpses": 3}


def make(policy=Gaussian, retina=None, **options):
    torch.manual_seed(0)
    return GlimpseNetwork(
        5, retina=retina or Retina(4), policy=policy, **{"encoder": partial(MLPEncoder, features=8), **SMALL, **options}
    )


def images(*shape):
    return torch.randn(*(shape or (2, 3, 12, 10)), generator=torch.Generator().manual_seed(1))


def touched(module):
    """Return the names of the parameters that have a gradient."""
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
