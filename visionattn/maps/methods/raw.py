"""Heatmaps from the attention weights of one layer: raw attention, attention times value norms, and DINO's heads.

Shapes: B batch, W windows, H heads, K keys, h × w grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from visionattn.capture import Call, ClassRow, PatchRow, Reduction, Site, Survey, capture, place, run, survey_images
from visionattn.errors import UsageError
from visionattn.maps import artefacts
from visionattn.maps.method import (
    Explanation,
    Method,
    Target,
    attention_source,
    check_fuse,
    fitting,
    fuse_heads,
    require_attention,
)


class RawAttention(Method):
    """The attention weights of one layer: where the class token, or a patch, attends.

    For models with self-attention, or with a class token or learned queries that attend to the grid. Without a class
    token the map shows how much attention each patch gets on average over the queries of its window. For differential
    attention (Ye et al. 2024, 2410.05258, eq. 1; timm's `DiffAttention`) the map is A₁ − λ A₂, which may be negative.

    Args:
        layer: name of a module that attends, or its index among the modules that attend; −1 for the last.
        head: index of one head (default: all heads, fused).
        fuse: how to fuse heads: by their mean, maximum or minimum.
        query: (row, column) of a patch on the grid; the map shows its row of weights instead of the class token's.

    Raises:
        UsageError: `fuse` is not mean, max or min. When called: the layer has no such head or patch.
    """

    name = "raw"
    needs = "attention over positions"
    cost = "a forward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return bool(survey.attention)

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
        survey = require_attention(self.name, model, images_BCHW)
        sites = survey.attention
        site = sites[place(self.layer, [s.name for s in sites])]
        keep: Reduction = ClassRow()
        if self.query is not None:
            grid = None if site.queries is None else site.queries.grid
            if grid is None or not all(0 <= at < size for at, size in zip(self.query, grid, strict=True)):
                has = "its queries are not patches" if grid is None else f"its grid is {grid[0]}×{grid[1]}"
                raise UsageError(f"{site.name} has no patch {tuple(self.query)}: {has}")
            keep = PatchRow(*self.query)
        pair = differential(model, sites, site)
        layers: list[int | str] = [self.layer] if pair is None else list(pair.calls)
        with (
            artefacts.warn_of_artefacts(model, survey),
            capture(model, keep, layers=layers, strict=True) as records,
        ):
            output = run(model, images_BCHW)
        if pair is None:
            _, keys, weights_BWHK = records.kept()
        else:
            keys, weights_BWHK = site.keys, pair.difference([r.weights for r in records if r.weights is not None])
        heads = weights_BWHK.shape[2]
        if self.head is not None:
            if not 0 <= self.head < heads:
                raise UsageError(f"{site.name} has no head {self.head}; its heads are 0 to {heads - 1}")
            weights_BWK = weights_BWHK[:, :, self.head]
        else:
            weights_BWK = fuse_heads(weights_BWHK, self.fuse, 2)
        source = attention_source(site) if pair is None else f"differential {attention_source(site)}"
        return Explanation(keys.to_grid(weights_BWK, shared=True), output, None, source)


@dataclass(frozen=True)
class Differential:
    """A layer of differential attention: A₁ − λ A₂.

    Attributes:
        calls: indices of its calls of attention: one for A₁ and one for A₂, or a single one for both.
        factor: λ.
    """

    calls: tuple[int, ...]
    factor: float

    def difference(self, weights: list[Tensor]) -> Tensor:
        """Return A₁ − λ A₂, (B, W, H, K), from the weights of each call; a single call has 2 · H heads."""
        first, second = weights if len(self.calls) == 2 else weights[0].unflatten(2, (-1, 2)).unbind(3)
        return first - self.factor * second


def differential(model: nn.Module, sites: Sequence[Site], site: Site) -> Differential | None:
    """Return the layer of differential attention that a call belongs to; None if it belongs to none."""
    module = model.get_submodule(site.name)
    factor = getattr(module, "_compute_lambda", None)  # of timm's DiffAttention
    calls = tuple(number for number, other in enumerate(sites) if other.name == site.name)
    if not callable(factor) or len(calls) > 2:
        return None
    return Differential(calls, float(factor()))


class ValueNorm(Method):
    """Attention times the norm of the values: mean_h A_h[class, j] ‖v_hj‖ (after Kobayashi et al. 2020, 2004.10102).

    For models whose self-attention calls `scaled_dot_product_attention`. Deviation from the paper (eq. 5): the norm of
    each head's value vectors is taken before the output projection, and the heads are averaged afterwards.

    Args:
        layer: name of a module that attends, or its index among the modules that attend; −1 for the last.
    """

    name = "value_norm"
    needs = "attention over positions"
    cost = "a forward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return bool(survey.attention) and survey.attention[-1].fused

    def __init__(self, layer: int | str = -1) -> None:
        self.layer = layer

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        sites = require_attention(self.name, model, images_BCHW).attention
        site = sites[place(self.layer, [s.name for s in sites])]
        if not site.fused:
            raise UsageError(
                f"value_norm needs scaled_dot_product_attention; {site.name} computes its own softmax, so its values "
                "are not known."
                f"{fitting(survey_images(model, images_BCHW))}"
            )
        with capture(model, _TimesValueNorm(), layers=[self.layer], strict=True) as records:
            output = run(model, images_BCHW)
        record, keys, weights_BWHK = records.kept()
        return Explanation(keys.to_grid(weights_BWHK.mean(2), shared=True), output, None, attention_source(record))


class _TimesValueNorm(ClassRow):
    """The class token's row, each weight times the norm of its value."""

    def __call__(self, call: Call) -> Tensor:
        assert call.value is not None
        norms_BWHK: Tensor = call.value.float().norm(dim=-1)
        return super().__call__(call) * norms_BWHK


class DinoHeads(Method):
    """The heads of the last layer, as DINO shows them (Caron et al. 2021, 2104.14294, fig. 3 and 4).

    In each head, the class token's row keeps its largest weights until they reach the fraction `mass` of the sum over
    patches; the heads are then averaged. For one head use `RawAttention(head=i)`. For models with a class token.

    Args:
        mass: fraction of each head's weights to keep, in (0, 1]; 0.6 in the paper.
        layer: name of a module that attends, or its index among the modules that attend; −1 for the last.

    Raises:
        UsageError: mass is out of range. When called: the layer has no class token that attends to the whole grid.
    """

    name = "dino"
    needs = "attention over positions"
    cost = "a forward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return bool(survey.attention) and survey.attention[-1].reads_the_grid

    def __init__(self, *, mass: float = 0.6, layer: int | str = -1) -> None:
        if not 0 < mass <= 1:
            raise UsageError(f"mass must be in (0, 1], got {mass}")
        self.mass, self.layer = mass, layer

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        survey = require_attention(self.name, model, images_BCHW)
        sites = survey.attention
        site = sites[place(self.layer, [s.name for s in sites])]
        if site.class_query is None or site.windowed:
            raise UsageError(
                f"dino needs a class token that attends to the whole grid, and {site.name} has none."
                f"{fitting(survey_images(model, images_BCHW))}"
            )
        with artefacts.warn_of_artefacts(model, survey), capture(model, layers=[self.layer], strict=True) as records:
            output = run(model, images_BCHW)
        record, keys, weights_B1HK = records.kept()
        placed = keys.index_WN[0] >= 0
        weights_BHK = weights_B1HK[:, 0] * placed.to(weights_B1HK.device)
        largest_BHK, order = weights_BHK.sort(-1, descending=True)
        # for each weight, the sum of the larger weights; a weight is kept while this sum is below the mass
        before_BHK = largest_BHK.cumsum(-1) - largest_BHK
        keep_BHK = before_BHK < self.mass * weights_BHK.sum(-1, keepdim=True)
        shown_BHK = torch.zeros_like(weights_BHK).scatter_(-1, order, largest_BHK * keep_BHK)
        return Explanation(
            keys.to_grid(shown_BHK.mean(1)[:, None], shared=True), output, None, attention_source(record)
        )
