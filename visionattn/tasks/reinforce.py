"""REINFORCE for glimpses: rewards, baselines, the loss and its gradient noise, as plain functions.

    ∇ J = E[ Σ_t ∇ log π(l_t | s_t) · (G_t − b_t) ]            (Williams 1992; Mnih et al. 2014, 1406.6247, eq. 2–3)

G_t is the return after choice t; the baseline b_t does not depend on that choice.

Shapes: B images, R rollouts per image, T glimpses, K classes. t is a number too: the policy chooses the
locations of the last t glimpses.
"""

import torch
from torch import Tensor


def correct(logits_BRTK: Tensor, label_B: Tensor, choices: int) -> Tensor:
    """Return G (B, R, t): 1 if the prediction after the last glimpse is right, else 0."""
    right_BR = logits_BRTK[:, :, -1].argmax(-1) == label_B[:, None]
    return right_BR.to(logits_BRTK.dtype)[..., None].expand(-1, -1, choices)


def log_likelihood(logits_BRTK: Tensor, label_B: Tensor, choices: int) -> Tensor:
    """Return G (B, R, t): log p(label) after the last glimpse, ≤ 0."""
    return _log_likelihood(logits_BRTK, label_B)[..., -1:].expand(-1, -1, choices)


def confidence_gain(logits_BRTK: Tensor, label_B: Tensor, choices: int) -> Tensor:
    """Return G (B, R, t): the increase of p(label) from before the chosen glimpse to the last glimpse, in [−1, 1].

    The reward of each glimpse is its change of p(label), and the return of a choice is the sum of the rewards from its
    glimpse on. Before the first glimpse p is 1/K.
    """
    likely_BRT = _log_likelihood(logits_BRTK, label_B).exp()
    prior_BR1 = torch.full_like(likely_BRT[..., :1], 1 / logits_BRTK.shape[-1])
    before_BRT = torch.cat([prior_BR1, likely_BRT[..., :-1]], -1)
    return likely_BRT[..., -1:] - before_BRT[..., before_BRT.shape[-1] - choices :]


def _log_likelihood(logits_BRTK: Tensor, label_B: Tensor) -> Tensor:
    index = label_B[:, None, None, None].expand(*logits_BRTK.shape[:3], 1)
    return logits_BRTK.log_softmax(-1).gather(-1, index).squeeze(-1).detach()


def batch_mean(returns_BRt: Tensor) -> Tensor:
    """Return b (B, R, t): the mean over the batch without the rollout itself, which would add a bias."""
    others = returns_BRt.shape[0] * returns_BRt.shape[1] - 1
    if others < 1:
        return torch.zeros_like(returns_BRt)
    return (returns_BRt.sum((0, 1), keepdim=True) - returns_BRt) / others


def leave_one_out(returns_BRt: Tensor) -> Tensor:
    """Return b (B, R, t): the mean over the other rollouts of the same image.

    RLOO; Kool et al. 2019, "Buy 4 REINFORCE samples".

    Raises:
        ValueError: there is only one rollout.
    """
    rollouts = returns_BRt.shape[1]
    if rollouts < 2:
        raise ValueError(f"the baseline leave_one_out needs at least 2 rollouts of every image, got {rollouts}")
    return (returns_BRt.sum(1, keepdim=True) - returns_BRt) / (rollouts - 1)


def policy_loss(log_prob_BRt: Tensor, advantage_BRt: Tensor) -> Tensor:
    """Return − mean over images and rollouts of Σ_t log π_t · A_t; no gradient flows into the advantage A."""
    return -(log_prob_BRt * advantage_BRt.detach()).sum(-1).mean()


def gradient_noise(gradient_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate the noise of a gradient estimate from the gradients (N, V) of N single rollouts.

    Returns:
        The variance of a single rollout's gradient, and the signal-to-noise ratio of the mean gradient:
        max(0, |mean gradient|² − variance of the mean) / variance of the mean.
    """
    mean_V = gradient_NV.mean(0)
    variance = (gradient_NV - mean_V).square().sum() / max(1, len(gradient_NV) - 1)
    mean_variance = variance / len(gradient_NV)
    signal = (mean_V.square().sum() - mean_variance).clamp(min=0)
    return variance, signal / mean_variance.clamp(min=torch.finfo(mean_variance.dtype).tiny)
