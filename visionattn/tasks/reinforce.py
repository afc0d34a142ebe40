"""REINFORCE for glimpses: rewards, baselines and the loss, as plain functions.

    ∇ J = E[ Σ_t ∇ log π(l_t | s_t) · (G_t − b_t) ]            (Williams 1992; Mnih et al. 2014, 1406.6247, eq. 2–3)

G_t is what was earned after choice t, b_t a baseline that does not depend on that choice.

Shapes: B images, R rollouts of each, T glimpses, t choices of a location (the last t of the T), K classes.
"""

import torch
from torch import Tensor


def correct(logits_BRTK: Tensor, label_B: Tensor, choices: int) -> Tensor:
    """G (B, R, t): 1 if the answer after the last glimpse is right, 0 if it is not."""
    right_BR = logits_BRTK[:, :, -1].argmax(-1) == label_B[:, None]
    return right_BR.to(logits_BRTK.dtype)[..., None].expand(-1, -1, choices)


def log_likelihood(logits_BRTK: Tensor, label_B: Tensor, choices: int) -> Tensor:
    """G (B, R, t): log p(label) after the last glimpse, ≤ 0."""
    return _log_likelihood(logits_BRTK, label_B)[..., -1:].expand(-1, -1, choices)


def confidence_gain(logits_BRTK: Tensor, label_B: Tensor, choices: int) -> Tensor:
    """G (B, R, t): by how much p(label) grew from before the glimpse that was chosen to the last one, in [−1, 1].

    Each glimpse is paid the change in p(label) that it brings, and a choice earns what comes after it. Before the first
    glimpse p is 1/K.
    """
    likely_BRT = _log_likelihood(logits_BRTK, label_B).exp()
    nothing_BR1 = torch.full_like(likely_BRT[..., :1], 1 / logits_BRTK.shape[-1])
    before_BRT = torch.cat([nothing_BR1, likely_BRT[..., :-1]], -1)
    return likely_BRT[..., -1:] - before_BRT[..., before_BRT.shape[-1] - choices :]


def _log_likelihood(logits_BRTK: Tensor, label_B: Tensor) -> Tensor:
    index = label_B[:, None, None, None].expand(*logits_BRTK.shape[:3], 1)
    return logits_BRTK.log_softmax(-1).gather(-1, index).squeeze(-1).detach()


def batch_mean(returns_BRt: Tensor) -> Tensor:
    """b (B, R, t): the mean over all other rollouts of the batch; without one's own it leaves the gradient unbiased."""
    others = returns_BRt.shape[0] * returns_BRt.shape[1] - 1
    if others < 1:
        return torch.zeros_like(returns_BRt)
    return (returns_BRt.sum((0, 1), keepdim=True) - returns_BRt) / others


def leave_one_out(returns_BRt: Tensor) -> Tensor:
    """b (B, R, t): the mean over the other rollouts of the same image (RLOO; Kool et al. 2019, "Buy 4
    REINFORCE samples").

    Raises:
        ValueError: there is one rollout only.
    """
    rollouts = returns_BRt.shape[1]
    if rollouts < 2:
        raise ValueError("leave-one-out needs at least 2 rollouts of every image")
    return (returns_BRt.sum(1, keepdim=True) - returns_BRt) / (rollouts - 1)


def policy_loss(log_prob_BRt: Tensor, advantage_BRt: Tensor) -> Tensor:
    """− mean over images and rollouts of Σ_t log π_t · A_t, whose gradient is minus the estimate; A gets none."""
    return -(log_prob_BRt * advantage_BRt.detach()).sum(-1).mean()


def gradient_noise(gradient_NV: Tensor) -> tuple[Tensor, Tensor]:
    """How noisy an estimate is, from the gradients (N, V) of N single rollouts.

    Returns:
        The variance of one rollout's gradient, and the signal-to-noise ratio of their mean: its squared norm, corrected
        for what noise alone would give, over its variance; 0 where noise explains it all.
    """
    mean_V = gradient_NV.mean(0)
    variance = (gradient_NV - mean_V).square().sum() / max(1, len(gradient_NV) - 1)
    of_mean = variance / len(gradient_NV)
    signal = (mean_V.square().sum() - of_mean).clamp(min=0)
    return variance, signal / of_mean.clamp(min=torch.finfo(of_mean.dtype).tiny)
