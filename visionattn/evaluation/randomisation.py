"""Randomisation: does a heatmap depend on the model's weights? The sanity check of Adebayo et al. 2018 (1810.03292).

Shapes: B images, h × w cells of a heatmap, N = h·w.
"""

import copy

import torch
from torch import Tensor, nn

from visionattn.capture import unwrap


def shuffled(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Return a copy of a model in which the values of each weight tensor are shuffled.

    This is the last stage of the model parameter randomisation test of Adebayo et al. 2018 (1810.03292, section 3.1),
    in which all layers are random. Deviation from the paper: the weights are shuffled instead of initialised again.
    Shuffling needs no knowledge of the initialisation and keeps activations in their range. It includes class tokens
    and position embeddings, which no `reset_parameters` covers. The running statistics of batch normalisation are
    shuffled too. Other buffers are not learned and stay unchanged.

    Args:
        model: any model; unchanged.
        seed: seed of the shuffle.
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
    """Return Spearman's rank correlation of each pair of heatmaps, (B,) float32 in [−1, 1].

    Equal values share their mean rank. The correlation is 0 if one map of a pair is constant, and 1 if both are.

    Args:
        a_Bhw: heatmaps.
        b_Bhw: heatmaps of the same shape.
    """
    ranks_2BN = torch.stack([_mean_rank(heatmaps.flatten(1)) for heatmaps in (a_Bhw, b_Bhw)])
    centred_2BN = ranks_2BN - ranks_2BN.mean(2, keepdim=True)
    spread_2B = centred_2BN.square().sum(2).sqrt()
    product_B = spread_2B.prod(0)
    both_constant_B = (spread_2B == 0).all(0).to(product_B.dtype)
    correlation_B = centred_2BN.prod(0).sum(1) / torch.where(product_B == 0, 1, product_B)
    return torch.where(product_B == 0, both_constant_B, correlation_B).float()


def _mean_rank(values_BN: Tensor) -> Tensor:
    """Return the rank of each value in its row; equal values share their mean rank."""
    values_BN = values_BN.contiguous()
    sorted_BN = values_BN.sort(1).values
    below_BN, up_to_BN = (torch.searchsorted(sorted_BN, values_BN, right=right) for right in (False, True))
    return (below_BN + up_to_BN).double() / 2
