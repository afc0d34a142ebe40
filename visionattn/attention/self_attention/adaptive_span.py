"""Self-attention whose heads learn how far they attend (their span). A head does not attend beyond its span.

Shapes: as in dense.py.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from visionattn.attention.self_attention.block_attention import Run, Runs, plan
from visionattn.attention.self_attention.dense import MaskedAttention, cells, in_blocks


class AdaptiveSpan(MaskedAttention):
    """Self-attention whose heads learn their span (Sukhbaatar et al. 2019, 1905.07799, eq. 3–5), on a grid.

        a_ij = m(d_ij) exp(s_ij) / Σ_j m(d_ij) exp(s_ij)        s_ij = q_i · k_j / √D
        m(d) = clip((R + z − d) / R, 0, 1)                       z the head's span, R the ramp
        d_ij = max(|row_i − row_j|, |column_i − column_j|)

    Each head has its own z, stored as a fraction of `max_span`. A head computes only the blocks within its span, so
    small spans take less time. If all heads reach nearly all patches, one dense call computes all heads. A penalty in
    the loss makes the spans shrink, see `mean_span`. Deviations from the paper: the distance is the larger of the row
    and column distances; the logits have no position embeddings; the initial span is an argument instead of 0.

    Args:
        num_heads: H.
        max_span: the largest z, in patches. A head can attend to all patches if `max_span` is at least the largest
            distance between two patches.
        ramp: R, in patches (default: 2).
        init: initial z, as a fraction of `max_span` (default: 0.5).

    Raises:
        ValueError: an argument is out of its range.
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
        """The span z of every head, (H,), in patches."""
        # the clamp passes the gradient on unchanged: with a zero gradient, a head could never leave the bounds 0 and 1
        return (self.span + (self.span.clamp(0, 1) - self.span).detach()) * self.max_span

    def reach(self, extent: int) -> Tensor:
        """Return m of every head at every offset from a patch, (H, 2 · extent + 1, 2 · extent + 1)."""
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
        if self.training:  # as in the authors' code; through .data, since autograd may still need this parameter
            self.span.data.clamp_(0, 1)
        if torch.compiler.is_compiling():  # a compiled graph cannot depend on the values of spans
            return self.dense(q_BHND, k_BHND, v_BHND, grid, prefix, p)
        outputs: dict[int, Tensor] = {}
        spans = self.spans
        for runs, heads in self._heads_by_blocks(grid, spans):
            if runs is None and len(heads) == self.num_heads:
                return self.dense(q_BHND, k_BHND, v_BHND, grid, prefix, p)
            z = spans[heads]

            def ramp(row: Run, column: Run, z: Tensor = z) -> Tensor:
                rows, columns = row.distance(z.device), column.distance(z.device)
                distance = torch.maximum(rows[:, None, :, None], columns[None, :, None])
                return self._bias(distance.flatten(2).flatten(0, 1), z).to(q_BHND.dtype)

            q, k, v = (x[:, heads] if len(heads) > 1 else x.narrow(1, heads[0], 1) for x in (q_BHND, k_BHND, v_BHND))
            whole = (Run.whole(grid[0]),), (Run.whole(grid[1]),)
            out_BHND = in_blocks(q, k, v, grid, prefix, whole if runs is None else runs, ramp, p)
            outputs |= zip(heads, out_BHND.unbind(1), strict=True)
        return torch.stack([outputs[head] for head in range(self.num_heads)], 2).transpose(1, 2)

    def _bias(self, distance: Tensor, z_H: Tensor) -> Tensor:
        """Return log m of every head, (H, *distance)."""
        z = z_H.view(-1, *(1,) * distance.ndim)
        m = ((self.ramp + z - distance) / self.ramp).clamp(0, 1)
        # the clamp keeps the gradient of the logarithm finite; m = 0 gets no gradient
        return torch.where(m > 0, m.clamp(min=torch.finfo(m.dtype).tiny).log(), -math.inf)

    def _heads_by_blocks(self, grid: tuple[int, int], spans: Tensor) -> list[tuple[Runs | None, list[int]]]:
        """Group heads that compute the same blocks; None instead of blocks if one call over all tokens costs less."""
        groups: dict[Runs | None, list[int]] = defaultdict(list)
        for head, span in enumerate(spans.tolist()):
            radius = math.ceil(span + self.ramp) - 1
            groups[around(grid, min(radius, max(grid) - 1))].append(head)
        return list(groups.items())


def around(grid: tuple[int, int], radius: int) -> Runs | None:
    """Return blocks for attention of every patch to the patches up to `radius` rows and columns away; see `plan`."""
    reaches = ([(max(0, i - radius), min(size, i + radius + 1)) for i in range(size)] for size in grid)
    return plan(*reaches)


def spans(model: nn.Module) -> dict[str, Tensor]:
    """Return the spans of a model's heads: name of each `AdaptiveSpan` → (H,), in patches, differentiable."""
    return {name: part.spans for name, part in model.named_modules() if isinstance(part, AdaptiveSpan)}


def mean_span(model: nn.Module) -> Tensor | None:
    """Return the mean span of all heads, in patches, or None if no head has a span; for use as a term of the loss.

    The paper's penalty is λ/M Σ z over the M heads of each layer (Sukhbaatar et al. 2019, eq. 6).
    """
    head_spans = list(spans(model).values())
    return torch.cat(head_spans).mean() if head_spans else None
