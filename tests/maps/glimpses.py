"""A small glimpse network, and images for it."""

import torch

from visionattn.attention import Gaussian, Retina
from visionattn.models import GlimpseNetwork, MLPEncoder


def network(patch_size=4, *, scales=2, subpixel=False, channels=1, **options):
    """Return an untrained network; its large policy weights give glimpses at different locations."""
    torch.manual_seed(0)
    options = {"num_glimpses": 4, "policy": Gaussian, "encoder": MLPEncoder} | options
    model = GlimpseNetwork(
        5, retina=Retina(patch_size, scales=scales, subpixel=subpixel), in_chans=channels, hidden_size=16, **options
    )
    with torch.no_grad():
        model.policy.layers[-1].weight.mul_(300)
    return model.eval()


def images(height=12, width=15, batch=3, channels=1):
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(1))
