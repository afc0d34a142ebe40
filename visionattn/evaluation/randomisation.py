"""Does a heatmap depend on what the model has learned? The sanity check of Adebayo et al. 2018 (1810.03292).

Shapes: B images, h × w cells of a heatmap, N = h·w.
"""

import copy

import torch
from torch import Tensor, nn

from visionattn.capture.running import unwrap


def shuffled(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Copy a model, and shuffle the numbers inside each of its weights: what was learned is gone, their spread is not.

    The model parameter randomisation test of Adebayo et al. 2018 (1810.03292, section 3.1), at its end, where all
    layers are random. Deviation from the paper: it draws weights anew as they were before training. Shuffling needs no
    knowledge of how that was, reaches class tokens and position embeddings too, which no `reset_parameters` does, and
    keeps activations in their range. The statistics of batch normalisation are shuffled alike; other buffers are not
    learned and stay.
    """
    with torch.inference_mode(False), torch.no_grad():
        return _shuffled(copy.deepcopy(unwrap(model)), seed)


def _shuffled(random: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    weights: list[Tensor] = list(random.parameters())
    for module in random.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            weights += [buffer for name, buffer in module.named_buffers(recurse=False) if name.startswith("running_")]
    for weight in weights:
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        weight.copy_(weight.flatten()[order].view_as(weight))
    return random


def rank_correlation(a_Bhw: Tensor, b_Bhw: Tensor) -> Tensor:
    """Spearman's rank correlation of each pair of heatmaps, (B,) in [−1, 1]; equal values share their mean rank.

    A constant map is correlated with no other, 0, but with another constant one, 1.
    """
    ranks_2BN = torch.stack([_mean_rank(heatmaps.flatten(1)) for heatmaps in (a_Bhw, b_Bhw)])
    centred_2BN = ranks_2BN - ranks_2BN.mean(2, keepdim=True)
    spread_2B = centred_2BN.square().sum(2).sqrt()
    product_B = spread_2B.prod(0)
    both_constant_B = (spread_2B == 0).all(0).to(product_B.dtype)
    found_B = centred_2BN.prod(0).sum(1) / torch.where(product_B == 0, 1, product_B)
    return torch.where(product_B == 0, both_constant_B, found_B).float()


def _mean_rank(values_BN: Tensor) -> Tensor:
    """Rank of each value among its row; equal values share their mean rank."""
    values_BN = values_BN.contiguous()
    sorted_BN = values_BN.sort(1).values
    below_BN, up_to_BN = (torch.searchsorted(sorted_BN, values_BN, right=right) for right in (False, True))
    return (below_BN + up_to_BN).double() / 2
