"""Heads that learn how far they reach, and then compute no further.

Shapes: as in self_attention.py.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from visionattn.attention.self_attention.block_attention import Run, Runs, plan
from visionattn.attention.self_attention.dense import MaskedAttention, cells, in_blocks


class AdaptiveSpan(MaskedAttention):
    """Adaptive attention span (Sukhbaatar et al. 2019, 1905.07799, eq. 3–5) on a grid.

        a_ij = m(d_ij) exp(s_ij) / Σ_j m(d_ij) exp(s_ij)        s_ij = q_i · k_j / √D
        m(d) = clip((R + z − d) / R, 0, 1)                       z the head's span, R the ramp
        d_ij = max(|row_i − row_j|, |column_i − column_j|)

    Each head has a z of its own, kept as a share of the largest and between 0 and it. A head computes the blocks that
    it reaches and no others, in training and afterwards, so that small spans cost less time; where all heads reach
    nearly everything, all is one call. What makes spans shrink is a penalty on them, see `mean_span`. Deviations
    from the paper: patches lie on a grid, so the distance is the larger of two, and there are no position embeddings in
    the logits; spans start as you say, not at 0.

    Args:
        num_heads: H.
        max_span: the largest z, in patches; choose at least what separates the farthest patches for a head that can
            see everything.
        ramp: R, in patches.
        init: z at first, as a share of `max_span`.
    """

    def __init__(self, num_heads: int, *, max_span: float, ramp: float = 2.0, init: float = 0.5) -> None:
        super().__init__(num_heads)
        if max_span <= 0 or ramp <= 0 or not 0 <= init <= 1:
            raise ValueError(f"max_span and ramp must be > 0 and init in [0, 1], got {max_span}, {ramp} and {init}")
        self.max_span = max_span
        self.ramp = ramp
        self.span = nn.Parameter(torch.full((num_heads,), float(init)))

    @property
    def spans(self) -> Tensor:
        """z of every head in patches, (H,)."""
        # the clamp passes every gradient on: one that stops at 0 and 1 would keep a head there for ever
        return (self.span + (self.span.clamp(0, 1) - self.span).detach()) * self.max_span

    def reach(self, extent: int) -> Tensor:
        """m of every head around a patch, (H, 2 · extent + 1, 2 · extent + 1)."""
        away = torch.arange(-extent, extent + 1, device=self.span.device).abs()
        return self._bias(torch.maximum(away[:, None], away), self.spans).exp()

    def extra_repr(self) -> str:
        spans = ", ".join(f"{span:.1f}" for span in self.spans.tolist())
        return f"spans {spans} of {self.max_span:g}, ramp {self.ramp:g}"

    def mask(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        distances = ((cell_N[:, None] - cell_N).abs() for cell_N in cells(grid, device))
        return self._bias(torch.maximum(*distances), self.spans)

    def sparse(
        self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, grid: tuple[int, int], prefix: int, p: float
    ) -> Tensor:
        if self.training:  # as the authors' code; unseen by autograd, to which two passes may lie before one backward
            self.span.data.clamp_(0, 1)
        if torch.compiler.is_compiling():  # what is computed may not depend on values
            return self.dense(q_BHND, k_BHND, v_BHND, grid, prefix, p)
        outputs: dict[int, Tensor] = {}
        spans = self.spans
        for runs, heads in self._alike(grid, spans):
            if runs is None and len(heads) == self.num_heads:
                return self.dense(q_BHND, k_BHND, v_BHND, grid, prefix, p)
            z = spans[heads]

            def ramp(row: Run, column: Run, z: Tensor = z) -> Tensor:
                rows, columns = row.distance(z.device), column.distance(z.device)
                distance = torch.maximum(rows[:, None, :, None], columns[None, :, None])
                return self._bias(distance.flatten(2).flatten(0, 1), z).to(q_BHND.dtype)

            some = [x[:, heads] if len(heads) > 1 else x.narrow(1, heads[0], 1) for x in (q_BHND, k_BHND, v_BHND)]
            whole = (Run.whole(grid[0]),), (Run.whole(grid[1]),)
            q, k, v = some
            out_BHND = in_blocks(q, k, v, grid, prefix, whole if runs is None else runs, ramp, p)
            outputs |= zip(heads, out_BHND.unbind(1), strict=True)
        return torch.stack([outputs[head] for head in range(self.num_heads)], 2).transpose(1, 2)

    def _bias(self, distance: Tensor, z_H: Tensor) -> Tensor:
        """log m of every head, (H, *distance)."""
        z = z_H.view(-1, *(1,) * distance.ndim)
        m = ((self.ramp + z - distance) / self.ramp).clamp(0, 1)
        # within the clamp no gradient is infinite; where m is 0 there is none
        return torch.where(m > 0, m.clamp(min=torch.finfo(m.dtype).tiny).log(), -math.inf)

    def _alike(self, grid: tuple[int, int], spans: Tensor) -> list[tuple[Runs | None, list[int]]]:
        """Heads that compute the same blocks; None in place of blocks where all of them cost less."""
        groups: dict[Runs | None, list[int]] = defaultdict(list)
        for head, span in enumerate(spans.tolist()):
            radius = math.ceil(span + self.ramp) - 1
            groups[around(grid, min(radius, max(grid) - 1))].append(head)
        return list(groups.items())


def around(grid: tuple[int, int], radius: int) -> Runs | None:
    """Blocks in which every patch reaches those at most so many rows and columns away; see `plan`."""
    reaches = ([(max(0, i - radius), min(size, i + radius + 1)) for i in range(size)] for size in grid)
    return plan(*reaches)


def spans(model: nn.Module) -> dict[str, Tensor]:
    """The spans of a model's heads: name of each `AdaptiveSpan` → (H,) patches, in the graph of its parameter."""
    return {name: part.spans for name, part in model.named_modules() if isinstance(part, AdaptiveSpan)}


def mean_span(model: nn.Module) -> Tensor | None:
    """The mean span of all heads, in patches, to be added to the loss times a weight; None where no head has one.

    Sukhbaatar et al. 2019, eq. 6: λ/M Σ z, there layer by layer.
    """
    found = list(spans(model).values())
    return torch.cat(found).mean() if found else None
