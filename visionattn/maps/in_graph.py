"""A model and its heatmap method as one graph for `torch.export` and ONNX: one forward pass computes both outputs.

Only methods without gradients and without branches on values can be part of a graph: raw attention, rollout, gates, and
Grad-CAM of a model with a linear head, for which the gradients are known.

Shapes: B images, C channels, K outputs, W windows, H heads, Q queries, N keys or positions, h × w grid.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from visionattn.capture import (
    Activation,
    Call,
    Interception,
    NoWeights,
    Reduction,
    Site,
    Tokens,
    capture,
    on_grid,
    run,
    survey_images,
)
from visionattn.errors import UsageError
from visionattn.maps.method import fuse_heads, require_attention, scores_of
from visionattn.maps.methods.cam import Cut, target_layer
from visionattn.maps.methods.gates import Gate, spatial_gates
from visionattn.maps.methods.rollout import Row, check_chain, class_row_only


class Graph(nn.Module, ABC):
    """A model and its heatmap method: (B, C, H, W) → scores (B, K), heatmaps (B, h, w) in [0, 1].

    The heatmaps equal the heatmaps of the method with the same name. Each heatmap spans the whole input of the model.
    Its smallest value is 0 and its largest 1; a constant map is 0 everywhere.

    Args:
        model: in evaluation mode, with parameters that do not require gradients.
        image_1CHW: an example of the model's input. The graph takes any number of images of that size.

    Raises:
        UsageError: the model does not meet the needs of the method, or selects its tokens by the image's content.
    """

    method: ClassVar[str]
    """Name of the method, a key of `maps.METHODS`."""

    def __init__(self, model: nn.Module, image_1CHW: Tensor) -> None:
        super().__init__()
        self.model = model
        if survey_images(model, image_1CHW).picks:
            raise UsageError(
                f"this {type(model).__name__} selects its tokens depending on the image, so their positions cannot be "
                "part of the graph; export the model without its token reduction"
            )
        self.plan(image_1CHW)
        self(image_1CHW)  # computes the cached positions of tokens before the graph is traced

    @abstractmethod
    def plan(self, image_1CHW: Tensor) -> None:
        """Prepare the method for the model; raise a UsageError if the model does not meet the method's needs."""

    @abstractmethod
    def watch(self, images_BCHW: Tensor) -> tuple[object, Tensor]:
        """Return the model's output, and the map (B, h, w) before it is scaled to [0, 1]."""

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        output, raw_Bhw = self.watch(images_BCHW)
        low_B11 = raw_Bhw.amin((1, 2), keepdim=True)
        span_B11 = raw_Bhw.amax((1, 2), keepdim=True) - low_B11
        flat_B11 = span_B11 <= 1e-6 * raw_Bhw.abs().amax((1, 2), keepdim=True) + torch.finfo(torch.float32).tiny
        heatmap_Bhw = (raw_Bhw - low_B11) / torch.where(flat_B11, torch.ones_like(span_B11), span_B11)
        return scores_of(output), torch.where(flat_B11, torch.zeros_like(heatmap_Bhw), heatmap_Bhw)


class RawGraph(Graph):
    """`maps.RawAttention` of the last layer."""

    method = "raw"

    def plan(self, image_1CHW: Tensor) -> None:
        require_attention("raw", self.model, image_1CHW)

    def watch(self, images_BCHW: Tensor) -> tuple[object, Tensor]:
        with capture(self.model, _Row(), layers=[-1]) as records:
            output = self.model(images_BCHW)
        _, keys, weights_BWHN = records.kept()
        return output, keys.to_grid(fuse_heads(weights_BWHN, "mean", 2), shared=True)


class _Row(Reduction):
    """The same as `ClassRow`, without loops over images."""

    def __call__(self, call: Call) -> Tensor:
        index = call.site.class_query
        if index is not None:
            return call.rows(slice(index, index + 1))[:, :, :, 0]
        first = call.site.queries.num_prefix_tokens if call.site.queries else 0
        return call.rows(slice(None))[:, :, :, first:].mean(3)


class RolloutGraph(Graph):
    """`maps.Rollout`."""

    method = "rollout"

    def plan(self, image_1CHW: Tensor) -> None:
        survey = require_attention("rollout", self.model, image_1CHW)
        check_chain("rollout", survey)
        self.count = len(survey.attention)

    def watch(self, images_BCHW: Tensor) -> tuple[object, Tensor]:
        with _Layers(self.model, self.count) as tape:
            output = self.model(images_BCHW)
        row = Row.start(tape.layers[-1][0], images_BCHW.shape[0], images_BCHW.device)
        for site, weights_BWQN in reversed(tape.layers):
            row = row.step(site, weights_BWQN, keep=0.5, add=0.5)
        return output, row.grid_Bhw


class _Layers(Interception):
    """Keeps the attention of every layer, averaged over heads.

    If the last layer has a class token, only the row of this token is kept there.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__(model)
        self.count = count
        self.layers: list[tuple[Site, Tensor]] = []

    def attended(self, call: Call, out: Tensor, kept: Tensor | None) -> None:
        index, site = call.site.class_query, call.site
        last = len(self.layers) == self.count - 1 and index is not None
        rows = slice(index, index + 1) if last and index is not None else slice(None)
        self.layers.append((class_row_only(site) if last else site, call.rows(rows).mean(2)))


class GateGraph(Graph):
    """`maps.Gate` of the last gate over positions."""

    method = "gate"

    def plan(self, image_1CHW: Tensor) -> None:
        Gate().explain(self.model, image_1CHW, None)

    def watch(self, images_BCHW: Tensor) -> tuple[object, Tensor]:
        with capture(self.model, NoWeights()) as records:
            output = self.model(images_BCHW)
        spatial = spatial_gates(records)
        return output, on_grid([record for record in spatial if record.name == spatial[-1].name])


class LinearCAMGraph(Graph):
    """`maps.GradCAM` of the predicted class, for a model with a linear head after a mean over positions.

        relu(Σ_c w_kc A_c)        k the predicted class, w the head's weights, A the layer before the mean

    This is class activation mapping (Zhou et al. 2016, 1512.04150, eq. 2): with a linear head after a mean, the head's
    weights are the gradients.
    """

    method = "gradcam"
    weight_KC: Tensor  # noqa: N815
    on_grid_N: Tensor  # noqa: N815

    def plan(self, image_1CHW: Tensor) -> None:
        self.activation = target_layer(self.model, survey_images(self.model, image_1CHW), None)
        self.tokens, on_grid_N = tokens_on_grid(self.activation)
        self.register_buffer("weight_KC", self._linear(image_1CHW), persistent=False)
        self.register_buffer("on_grid_N", on_grid_N, persistent=False)

    def _linear(self, image_1CHW: Tensor) -> Tensor:
        """Return the head's weights (K, C), after checking on noise that the gradients of some scores equal them.

        Raises:
            UsageError: the weights differ from the gradients.
        """
        noise_2CHW = torch.randn(2, *image_1CHW.shape[1:], generator=torch.Generator().manual_seed(0)).to(image_1CHW)
        with Cut(self.model, self.activation.name) as cut:
            output = run(self.model, noise_2CHW)
        scores_2K = scores_of(output)
        refusal = UsageError(
            "gradcam can be exported only if a linear head follows a mean over positions; other layers follow "
            f"{self.activation.name} of this {type(self.model).__name__}, so export another method"
        )
        heads = [part for part in self.model.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
        fitting = [part.weight.flatten(1) for part in heads if part.weight.shape[0] == scores_2K.shape[1]]
        if not fitting or not scores_2K.requires_grad:
            raise refusal
        weight_KC = fitting[-1]
        for k in sorted({0, 1, scores_2K.shape[1] // 2, scores_2K.shape[1] - 1}):
            assert cut.leaf is not None
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(scores_2K[:, k].sum(), cut.leaf, retain_graph=True)
            gradient_2CN = gradient.movedim(self.activation.channel_axis, 1).flatten(2)
            if gradient_2CN.shape[1] != weight_KC.shape[1]:
                raise refusal
            expected_1C1 = weight_KC[k][None, :, None] / gradient_2CN.shape[2]
            if not torch.allclose(gradient_2CN, expected_1C1.expand_as(gradient_2CN), rtol=1e-3, atol=1e-6):
                raise refusal
        return weight_KC.detach().clone()

    def watch(self, images_BCHW: Tensor) -> tuple[object, Tensor]:
        outputs: list[Tensor] = []

        def keep(module: nn.Module, args: object, out: Tensor | tuple[Tensor, ...] | list[Tensor]) -> None:
            outputs.append(out[0] if isinstance(out, (tuple, list)) else out)

        handle = self.model.get_submodule(self.activation.name).register_forward_hook(keep)
        try:
            output = self.model(images_BCHW)
        finally:
            handle.remove()
        values_BCN = outputs[-1].movedim(self.activation.channel_axis, 1).flatten(2)[:, :, self.on_grid_N].float()
        weight_B1C = self.weight_KC[scores_of(output).argmax(1)][:, None]
        return output, self.tokens.to_grid((weight_B1C @ values_BCN).relu())


def tokens_on_grid(activation: Activation) -> tuple[Tokens, Tensor]:
    """Return the tokens of a layer's output that lie on the grid, and their indices (N,)."""
    placed_N = activation.tokens.index_WN[0] >= 0
    return activation.tokens.some(placed_N), placed_N.nonzero()[:, 0]


GRAPHS: dict[str, type[Graph]] = {graph.method: graph for graph in (RawGraph, RolloutGraph, GateGraph, LinearCAMGraph)}
"""Name of the method → class of its graph."""
