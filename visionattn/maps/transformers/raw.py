"""Heatmaps from attention weights.

Shapes: B batch, W windows, H heads, K keys, h × w grid.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from visionattn.capture.recording import capture, place
from visionattn.capture.reductions import Call, ClassRow, Keep, PatchRow
from visionattn.capture.running import run
from visionattn.errors import UsageError
from visionattn.maps import artefacts
from visionattn.maps.fitting import fitting
from visionattn.maps.method import Explanation, Method, Target, attending, attention_source, check_fuse, fuse_heads


class RawAttention(Method):
    """The weights of one layer as they are: what the class token, or a patch, attends to.

    For models with self-attention, or with a class token or learned queries that attend to the grid. Where there is no
    class token: how much each patch is attended to on average, window by window.

    Args:
        layer: name of a module that attends, or its place in their order; −1 for the last.
        head: one head; None to fuse them.
        fuse: how heads are fused.
        query: (row, column) of a patch on the grid to ask instead of the class token.
    """

    name = "raw"

    def __init__(
        self,
        layer: int | str = -1,
        *,
        head: int | None = None,
        fuse: Literal["mean", "max", "min"] = "mean",
        query: tuple[int, int] | None = None,
    ) -> None:
        check_fuse(fuse)
        self.layer, self.head, self.fuse, self.query = layer, head, fuse, query

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        found = attending(self.name, model, images_BCHW)
        sites = found.attention
        site = sites[place(self.layer, [s.name for s in sites])]
        keep: Keep = ClassRow()
        if self.query is not None:
            grid = None if site.queries is None else site.queries.grid
            if grid is None or not all(0 <= at < size for at, size in zip(self.query, grid, strict=True)):
                has = "no patches ask there" if grid is None else f"its grid is {grid[0]}×{grid[1]}"
                raise UsageError(f"{site.name} has no patch {tuple(self.query)}: {has}")
            keep = PatchRow(*self.query)
        with artefacts.warned(model, found), capture(model, keep, layers=[self.layer]) as records:
            output = run(model, images_BCHW)
        record, keys, weights_BWHK = records.kept()
        if self.head is not None:
            if not 0 <= self.head < record.heads:
                raise UsageError(f"{record.name} has no head {self.head}; its heads are 0 to {record.heads - 1}")
            weights_BWK = weights_BWHK[:, :, self.head]
        else:
            weights_BWK = fuse_heads(weights_BWHK, self.fuse, 2)
        return Explanation(keys.to_grid(weights_BWK, shared=True), output, None, attention_source(record))


class ValueNorm(Method):
    """Attention times the length of what it fetches: mean_h A_h[class, j] ‖v_hj‖ (after Kobayashi et al. 2020,
    2004.10102).

    For models with self-attention through `scaled_dot_product_attention`. Deviation from the paper (eq. 5): the norm is
    that of the value vectors of each head, before the output projection, and heads are averaged after it.

    Args:
        layer: name of a module that attends, or its place in their order; −1 for the last.
    """

    name = "value_norm"

    def __init__(self, layer: int | str = -1) -> None:
        self.layer = layer

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        sites = attending(self.name, model, images_BCHW).attention
        site = sites[place(self.layer, [s.name for s in sites])]
        if not site.fused:
            raise UsageError(
                f"value_norm needs the values of {site.name}, which attends by a softmax of its own and hides them."
                f"{fitting(model, images_BCHW)}"
            )
        with capture(model, _TimesValueNorm(), layers=[self.layer]) as records:
            output = run(model, images_BCHW)
        record, keys, weights_BWHK = records.kept()
        return Explanation(keys.to_grid(weights_BWHK.mean(2), shared=True), output, None, attention_source(record))


class _TimesValueNorm(ClassRow):
    def __call__(self, call: Call) -> Tensor:
        assert call.value is not None
        return super().__call__(call) * call.value.float().norm(dim=-1)


class DinoHeads(Method):
    """What the last layer's heads look at, as DINO shows it (Caron et al. 2021, 2104.14294, fig. 3 and 4).

    Each head's class row keeps its largest weights up to `mass` of the patches' total, and the heads are averaged. One
    head alone: `RawAttention(head=i)`. For models with a class token.

    Args:
        mass: share of each head's weights that is kept, in (0, 1]; 0.6 in the paper.
        layer: name of a module that attends, or its place in their order; −1 for the last.
    """

    name = "dino"

    def __init__(self, *, mass: float = 0.6, layer: int | str = -1) -> None:
        if not 0 < mass <= 1:
            raise UsageError(f"mass must be in (0, 1], got {mass}")
        self.mass, self.layer = mass, layer

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        found = attending(self.name, model, images_BCHW)
        sites = found.attention
        site = sites[place(self.layer, [s.name for s in sites])]
        if site.class_query is None or site.windowed:
            raise UsageError(
                f"dino needs a class token that sees the whole grid, and {site.name} has none."
                f"{fitting(model, images_BCHW)}"
            )
        with artefacts.warned(model, found), capture(model, layers=[self.layer]) as records:
            output = run(model, images_BCHW)
        record, keys, weights_B1HK = records.kept()
        placed = keys.index_WN[0] >= 0
        weights_BHK = weights_B1HK[:, 0] * placed.to(weights_B1HK.device)
        largest_BHK, order = weights_BHK.sort(-1, descending=True)
        before_BHK = largest_BHK.cumsum(-1) - largest_BHK  # so that the weight that reaches the mass is kept
        kept_BHK = before_BHK < self.mass * weights_BHK.sum(-1, keepdim=True)
        shown_BHK = torch.zeros_like(weights_BHK).scatter_(-1, order, largest_BHK * kept_BHK)
        return Explanation(
            keys.to_grid(shown_BHK.mean(1)[:, None], shared=True), output, None, attention_source(record)
        )
