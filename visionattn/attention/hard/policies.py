"""Policies: distributions over the location of the next glimpse.

Shapes: N decisions, D features of the state, P parameters of the distribution.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LOG_2PI = math.log(2 * math.pi)


class Choice(NamedTuple):
    """Chosen locations and their log-probabilities.

    Attributes:
        location: (N, 2), (x, y) in [−1, 1].
        log_prob: (N,), log-probability of the sampled action, before the action was clamped to the image.
        entropy: (N,), entropy of the distribution, in nats.
        clipped: (N,) bool, whether the action lay outside the image.
        parameters: (N, P), parameters of the distributions; row n affects decision n only.
    """

    location: Tensor
    log_prob: Tensor
    entropy: Tensor
    clipped: Tensor
    parameters: Tensor


class Policy(nn.Module, ABC):
    """A distribution over locations, whose parameters a small network computes from the state.

    Args:
        in_features: D.
        num_parameters: P.
        hidden_features: width of a hidden layer; 0 gives a linear map, as in the paper.
        pathwise: True keeps the gradient of the location with respect to the parameters, for comparison with
            REINFORCE; this needs a retina with `subpixel`. False detaches the location.
    """

    def __init__(self, in_features: int, num_parameters: int, *, hidden_features: int, pathwise: bool) -> None:
        super().__init__()
        last = nn.Linear(hidden_features or in_features, num_parameters)
        nn.init.normal_(last.weight, std=0.01)  # Gaussians start near the centre, Categorical near uniform
        nn.init.zeros_(last.bias)
        first = [nn.Linear(in_features, hidden_features), nn.ReLU()] if hidden_features else []
        self.layers = nn.Sequential(*first, last)
        self.pathwise = pathwise

    def forward(self, state_ND: Tensor, *, greedy: bool = False) -> Choice:
        """Sample a location for every state (N, D); `greedy` returns the most likely cell, or a Gaussian's mean."""
        parameters_NP = self.layers(state_ND)
        choice = self.choose(parameters_NP, greedy=greedy)
        if self.pathwise:
            return choice
        location, log_prob, entropy, clipped, parameters_NP = choice
        return Choice(location.detach(), log_prob, entropy, clipped, parameters_NP)  # torch 2.6 compiles no `_replace`

    @abstractmethod
    def choose(self, parameters_NP: Tensor, *, greedy: bool) -> Choice:
        """Choose a location for every row of parameters (N, P)."""

    def progress(self, share: float) -> None:
        """Update scheduled parameters; `share` is the fraction of the training that is done, in [0, 1]."""


class _Normal(Policy, ABC):
    """Base of the Gaussian policies: a mean, and a standard deviation that is fixed, scheduled or learned."""

    std: Tensor

    def __init__(
        self,
        in_features: int,
        *,
        std: float | tuple[float, float] = 0.1,
        learned_std: bool = False,
        hidden_features: int = 0,
        pathwise: bool = False,
    ) -> None:
        super().__init__(in_features, 4 if learned_std else 2, hidden_features=hidden_features, pathwise=pathwise)
        first, last = std if isinstance(std, (tuple, list)) else (std, std)
        if min(first, last) <= 0:
            raise ValueError(f"std must be > 0, got {std}")
        if learned_std and first != last:
            raise ValueError(f"std can be scheduled or learned, not both; got {std} and learned_std")
        self.schedule = (first, last)
        self.learned_std = learned_std
        self.register_buffer("std", torch.tensor(float(first)))

    def progress(self, share: float) -> None:
        first, last = self.schedule
        if first != last:
            self.std.fill_(first * (last / first) ** share)

    def _mean_and_std(self, parameters_NP: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first two parameters and the standard deviation, both (N, 2)."""
        mean_N2 = parameters_NP[:, :2]
        if not self.learned_std:
            return mean_N2, self.std.to(mean_N2).expand_as(mean_N2)
        return mean_N2, (self.std.log() + parameters_NP[:, 2:]).clamp(math.log(1e-3), math.log(2.0)).exp()


def _normal_log_prob(action: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return -0.5 * ((action - mean) / std).square() - std.log() - 0.5 * _LOG_2PI


class Gaussian(_Normal):
    """A normal distribution about a mean, clamped to the image (Mnih et al. 2014, section 3.1 and 4).

        action ~ N(tanh(mean), std²),    location = clamp(action, −1, 1)

    `log_prob` belongs to the action before the clamp. Deviation from the paper: tanh keeps the mean inside the image.
    All actions beyond an edge give the same glimpse, so a mean outside would get no gradient towards the image.

    Args:
        in_features: D.
        std: standard deviation (default: 0.1). A pair gives the values at the start and at the end of the training;
            between them, the standard deviation is interpolated geometrically.
        learned_std: predict a standard deviation for each axis from the state (default: False). It starts near `std`
            and stays within [0.001, 2].
        hidden_features, pathwise: see `Policy`.

    Raises:
        ValueError: std is not > 0, or is both scheduled and learned.
    """

    def choose(self, parameters_NP: Tensor, *, greedy: bool) -> Choice:
        mean_N2, std_N2 = self._mean_and_std(parameters_NP)
        mean_N2 = mean_N2.tanh()
        action_N2 = mean_N2 if greedy else mean_N2 + std_N2 * torch.randn_like(mean_N2)
        log_prob_N = _normal_log_prob(action_N2 if self.pathwise else action_N2.detach(), mean_N2, std_N2).sum(-1)
        entropy_N = (std_N2.log() + 0.5 * (1 + _LOG_2PI)).sum(-1)
        clipped_N = (action_N2.abs() > 1).any(-1)
        return Choice(action_N2.clamp(-1, 1), log_prob_N, entropy_N, clipped_N, parameters_NP)


class TruncatedGaussian(_Normal):
    """A normal distribution restricted to the image: no action is clipped, so every action has a gradient.

        p(l) = N(l; tanh(mean), std²) / (Φ((1 − mean)/std) − Φ((−1 − mean)/std)),    l in [−1, 1]

    The greedy location is the mode, tanh(mean).

    Args:
        in_features, std, learned_std, hidden_features, pathwise: see `Gaussian`.
    """

    def choose(self, parameters_NP: Tensor, *, greedy: bool) -> Choice:
        mean_N2, std_N2 = self._mean_and_std(parameters_NP)
        mean_N2 = mean_N2.tanh()
        low_N2, high_N2 = (-1 - mean_N2) / std_N2, (1 - mean_N2) / std_N2
        below_N2, above_N2 = torch.special.ndtr(low_N2), torch.special.ndtr(high_N2)
        mass_N2 = above_N2 - below_N2  # never near 0: the mean lies in the image, so mass ≥ ½ · P(|z| < 2/std)
        if greedy:
            location_N2 = mean_N2
        else:
            chance_N2 = below_N2 + mass_N2 * torch.rand_like(mean_N2)
            standard_N2 = torch.special.ndtri(chance_N2.clamp(1e-6, 1 - 1e-6))
            location_N2 = (mean_N2 + std_N2 * standard_N2).clamp(-1, 1)
        action_N2 = location_N2 if self.pathwise else location_N2.detach()
        log_prob_N = (_normal_log_prob(action_N2, mean_N2, std_N2) - mass_N2.log()).sum(-1)
        density_low, density_high = (torch.exp(-0.5 * edge.square() - 0.5 * _LOG_2PI) for edge in (low_N2, high_N2))
        drift_N2 = (low_N2 * density_low - high_N2 * density_high) / (2 * mass_N2)
        entropy_N = ((std_N2 * mass_N2).log() + 0.5 * (1 + _LOG_2PI) + drift_N2).sum(-1)
        clipped_N = torch.zeros_like(log_prob_N, dtype=torch.bool)
        return Choice(location_N2, log_prob_N, entropy_N, clipped_N, parameters_NP)


class TanhGaussian(_Normal):
    """A normal distribution mapped into the image by tanh; `log_prob` includes the derivative of tanh.

        u ~ N(mean, std²),    l = tanh(u),    log p(l) = log N(u) − Σ log(1 − tanh²(u))

    See Haarnoja et al. 2018, 1801.01290, appendix C. The greedy location is tanh(mean). The entropy has no closed form.
    `entropy` is an unbiased estimate: the entropy of u plus Σ log(1 − tanh²(u)) at the sampled u.

    Args:
        in_features, std, learned_std, hidden_features, pathwise: see `Gaussian`; `std` is the standard deviation of u.
    """

    def choose(self, parameters_NP: Tensor, *, greedy: bool) -> Choice:
        mean_N2, std_N2 = self._mean_and_std(parameters_NP)
        sampled_N2 = mean_N2 if greedy else mean_N2 + std_N2 * torch.randn_like(mean_N2)
        action_N2 = sampled_N2 if self.pathwise else sampled_N2.detach()
        # log(1 − tanh²(u)) = 2 (log 2 − u − softplus(−2u)), which does not overflow
        correction_N = 2 * (math.log(2) - action_N2 - F.softplus(-2 * action_N2)).sum(-1)
        log_prob_N = _normal_log_prob(action_N2, mean_N2, std_N2).sum(-1) - correction_N
        entropy_N = (std_N2.log() + 0.5 * (1 + _LOG_2PI)).sum(-1) + correction_N
        clipped_N = torch.zeros_like(log_prob_N, dtype=torch.bool)
        return Choice(sampled_N2.tanh(), log_prob_N, entropy_N, clipped_N, parameters_NP)


class Categorical(Policy):
    """A categorical distribution over the cells of a grid; the location is the centre of a cell.

    With `pathwise` this is the straight-through Gumbel-softmax (Jang et al. 2017, 1611.01144): the location is the
    centre of the sampled cell. Its gradient is that of a weighted mean of all centres, whose weights are the softmax of
    (log-probability + noise) / temperature.

    Args:
        in_features: D.
        grid: (rows, columns), or one number for both (default: 7).
        temperature: temperature of this softmax, > 0; used with `pathwise` only (default: 1).
        hidden_features, pathwise: see `Policy`.

    Raises:
        ValueError: grid or temperature is out of its range.
    """

    centres: Tensor

    def __init__(
        self,
        in_features: int,
        *,
        grid: int | tuple[int, int] = 7,
        temperature: float = 1.0,
        hidden_features: int = 0,
        pathwise: bool = False,
    ) -> None:
        rows, columns = (grid, grid) if isinstance(grid, int) else grid
        if min(rows, columns) < 1 or temperature <= 0:
            raise ValueError(f"grid must be ≥ 1 and temperature > 0, got {grid} and {temperature}")
        super().__init__(in_features, rows * columns, hidden_features=hidden_features, pathwise=pathwise)
        self.temperature = temperature
        y, x = ((2 * torch.arange(count) + 1) / count - 1 for count in (rows, columns))
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
        self.register_buffer("centres", centres, persistent=False)

    def choose(self, parameters_NP: Tensor, *, greedy: bool) -> Choice:
        log_prob_NP = parameters_NP.log_softmax(-1)
        # Gumbel noise: the argmax of log-probability plus noise is a sample
        noise_NP = -torch.empty_like(log_prob_NP).exponential_().log()
        score_NP = log_prob_NP if greedy else log_prob_NP + noise_NP
        cell_N1 = score_NP.argmax(-1, keepdim=True)
        location_N2 = self.centres.to(log_prob_NP)[cell_N1.squeeze(-1)]
        if self.pathwise:
            soft_NP = (score_NP / self.temperature).softmax(-1)
            mean_N2 = soft_NP @ self.centres.to(log_prob_NP)
            location_N2 = location_N2 + mean_N2 - mean_N2.detach()
        entropy_N = -(log_prob_NP.exp() * log_prob_NP).sum(-1)
        picked_N = log_prob_NP.gather(-1, cell_N1).squeeze(-1)
        return Choice(location_N2, picked_N, entropy_N, torch.zeros_like(picked_N, dtype=torch.bool), parameters_NP)
