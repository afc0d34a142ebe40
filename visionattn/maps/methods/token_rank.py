"""TokenRank: the stationary distribution of one layer's attention, read as a Markov chain.

Shapes: B images, H heads, N patches, h × w grid.
"""

import torch
from torch import Tensor, nn

from visionattn.capture import FullAttention, HeadMean, Reduction, Site, Survey, capture, place, run
from visionattn.errors import UsageError
from visionattn.maps import artefacts
from visionattn.maps.method import Explanation, Method, Target, attention_source, fitting, require_attention


class TokenRank(Method):
    """TokenRank (Erel et al. 2025, 2507.17657): the distribution π over patches that attention leaves unchanged.

        π P = π,        P = α A + (1 − α) / N        A the attention between the N patches, its rows scaled to sum to 1

    A random walker who follows the attention from patch to patch is at patch j in the share π_j of the time. The map
    shows which patches the image as a whole attends to, in the sense of PageRank; it explains no class. For models
    whose layer attends from all patches to all patches. Class and register tokens are left out, as in the authors'
    code. α is below 1, so that the distribution is unique. It is the solution of a linear system.

    Deviation from the paper: by default the heads are averaged, and not weighted by their second eigenvalues.

    Args:
        layer: name of a module that attends, or its index among the modules that attend; −1 for the last.
        head: index of one head (default: the mean over heads).
        alpha: α in (0, 1); .99 in the authors' code.

    Raises:
        UsageError: alpha is out of range. When called: the layer attends inside windows, not from every patch to every
            patch, or has no such head.
    """

    name = "token_rank"
    needs = "attention over positions"
    cost = "a forward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return bool(survey.attention) and _is_chain(survey.attention[-1])

    def __init__(self, layer: int | str = -1, *, head: int | None = None, alpha: float = 0.99) -> None:
        if not 0 < alpha < 1:
            raise UsageError(f"alpha must be between 0 and 1, got {alpha}")
        self.layer, self.head, self.alpha = layer, head, alpha

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        survey = require_attention(self.name, model, images_BCHW)
        site = survey.attention[place(self.layer, [s.name for s in survey.attention])]
        if not _is_chain(site):
            raise UsageError(
                f"token_rank needs a layer in which every patch attends to every patch, and {site.name} is none."
                f"{fitting(survey)}"
            )
        if self.head is not None and not 0 <= self.head < site.heads:
            raise UsageError(f"{site.name} has no head {self.head}; its heads are 0 to {site.heads - 1}")
        keep: Reduction = HeadMean() if self.head is None else FullAttention()
        with (
            artefacts.warn_of_artefacts(model, survey),
            capture(model, keep, layers=[self.layer], strict=True) as records,
        ):
            output = run(model, images_BCHW)
        record, keys, weights = records.kept()
        weights_BQK = weights[:, 0] if self.head is None else weights[:, 0, self.head]
        index_BN = keys.images(len(weights_BQK))[:, 0].to(weights_BQK.device)
        rank_BN = _stationary(weights_BQK, index_BN >= 0, self.alpha)
        return Explanation(keys.to_grid(rank_BN[:, None], shared=True), output, None, attention_source(record))


def _is_chain(site: Site) -> bool:
    """Return whether every patch attends to every patch."""
    if site.queries is None or site.windowed or site.context:
        return False
    return torch.equal(site.queries.index_WN, site.keys.index_WN)


def _stationary(weights_BNN: Tensor, present_BN: Tensor, alpha: float) -> Tensor:
    """Return the stationary distributions of α A + (1 − α) / n, (B, N), where A are the weights with rows scaled to 1.

    π = α π A + (1 − α) / n is a linear system. If a row of weights is all zero, the division by the sum of π has the
    same effect as a row of 1 / n. The system is nearly singular if α is almost 1 and most tokens attend to themselves,
    so it is solved in float64.

    Args:
        weights_BNN: attention between all tokens.
        present_BN: the n tokens of the chain; 0 is returned for the others.
        alpha: α.
    """
    dtype = torch.float32 if weights_BNN.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    weights_BNN = weights_BNN.to(dtype) * present_BN[:, None] * present_BN[:, :, None]
    total_BN1 = weights_BNN.sum(2, keepdim=True)
    step_BNN = weights_BNN / total_BN1.clamp(min=torch.finfo(dtype).tiny)
    identity_NN = torch.eye(present_BN.shape[1], dtype=dtype, device=present_BN.device)
    rank_BN = torch.linalg.solve(identity_NN - alpha * step_BNN.mT, present_BN.to(dtype))
    return (rank_BN / rank_BN.sum(1, keepdim=True)).float()
