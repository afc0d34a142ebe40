"""High-norm tokens: patch tokens in which a transformer stores global information, so that heatmaps are wrong there.

Darcet et al. 2024, "Vision transformers need registers", 2309.16588, §2. These patches get attention regardless of what
the image shows there. Models that are trained with register tokens have no high-norm patch tokens: they store the
global information in the register tokens, which are not on the grid. `add_registers` adds one without training.

Shapes: B images, N tokens, C channels, h × w grid.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visionattn.capture import Activation, Survey, compact_state, run, survey_images, surveys, undisturbed
from visionattn.data import encode_image
from visionattn.drawing import heatmap_sheet
from visionattn.errors import UsageError, warn
from visionattn.maps.method import check_images

RATIO, MAX_FRACTION, MIN_TOKENS = 3.0, 0.1, 64  # see `outliers`


@dataclass(frozen=True, repr=False)
class Artefacts:
    """The high-norm tokens of a batch of images.

    `print` shows how many there are, and a notebook draws the norms.

    Attributes:
        norms: (B, h, w) float32 ≥ 0, the L2 norm of each patch's token after the last block.
        mask: (B, h, w) bool, true for high-norm tokens.
        source: name of the block.
    """

    norms: Tensor
    mask: Tensor
    source: str

    def report(self) -> str:
        """Return the number of high-norm tokens, and the ratio of their norm to the norm of the other tokens."""
        count, images = int(self.mask.sum()), int(self.mask.flatten(1).any(1).sum())
        if not count:
            return f"no high-norm tokens after {self.source}"
        times = (self.norms[self.mask].mean() / self.norms[~self.mask].mean()).item()
        return (
            f"{count} high-norm tokens after {self.source} in {images} of {len(self.mask)} images, with {times:.1f} "
            "times the norm of the others: heatmaps do not show the image there (2309.16588)"
        )

    __repr__ = report

    def to_dict(self) -> dict[str, object]:
        """Return the result as plain data for `json.dumps`: `source`, `norms` and `mask` as nested lists."""
        return {"source": self.source, "norms": self.norms.tolist(), "mask": self.mask.tolist()}

    def _repr_png_(self) -> bytes:
        """Show the norms of the first images in a notebook."""
        return encode_image(heatmap_sheet(self.norms.float().cpu().numpy(), f"norms after {self.source}"), ".png")

    def __getstate__(self) -> dict[str, object]:
        return compact_state(self)


def find_artefacts(model: nn.Module, images_BCHW: Tensor, *, layer: str | None = None) -> Artefacts:
    """Find the patch tokens that have a far larger norm than the other tokens of their image.

    Args:
        model: a transformer with the same grid in every layer (ViT, DeiT, DINOv2, CLIP …); unchanged afterwards.
        images_BCHW: images, normalised for the model.
        layer: name of the module to measure the output of (default: the block that contains the last attention layer).

    Raises:
        UsageError: the model has no such module, or its output does not lie on a grid.
        DataError: the images hold NaN or infinity, or the batch is empty.
    """
    check_images(images_BCHW)
    with undisturbed(model) as bare:
        images_BCHW = images_BCHW.clone() if images_BCHW.is_inference() else images_BCHW.detach()
        activation = last_block(bare, survey_images(bare, images_BCHW), layer)
        if activation is None:
            part = "block of attention whose tokens lie" if layer is None else f"module {layer!r} whose output lies"
            raise UsageError(f"this {type(bare).__name__} has no {part} on a grid; find_artefacts needs a ViT")
        with _norms(bare, activation) as measured:
            run(bare, images_BCHW)
    return Artefacts(measured[-1], outliers(measured[-1]), activation.name)


def outliers(norms_Bhw: Tensor) -> Tensor:
    """Return which tokens have a high norm, (B, h, w) bool: more than three times the median norm of their image.

    Deviation from the paper: each image has its own threshold. The paper has one threshold, read from a histogram with
    two separate modes (150 for DINOv2-g, where other tokens have norms of about 50). If more than a tenth of an image's
    tokens exceed the threshold (2.4 % do in the paper), or the image has fewer than 64 tokens, none of its tokens
    counts as high-norm.
    """
    flat_BN = norms_Bhw.flatten(1)
    high_BN = flat_BN > RATIO * flat_BN.median(1, keepdim=True).values
    few_B1 = high_BN.float().mean(1, keepdim=True) <= MAX_FRACTION
    if flat_BN.shape[1] < MIN_TOKENS:
        few_B1 = torch.zeros_like(few_B1)
    return (high_BN & few_B1).reshape(norms_Bhw.shape)


def last_block(model: nn.Module, survey: Survey, layer: str | None = None) -> Activation | None:
    """Return the output of the last attention's block, or of a named module; None if it does not lie on a grid.

    The block is the innermost module that contains the attention layer and is an item of an `nn.Sequential` or
    `nn.ModuleList`.
    """
    outputs = {activation.name: activation for activation in survey.activations}
    if layer is not None:
        return outputs.get(layer)
    if not survey.attention or survey.attention[-1].windowed or survey.attention[-1].queries is None:
        return None
    name = survey.attention[-1].name
    while name:
        around = name.rpartition(".")[0]
        if name in outputs and isinstance(model.get_submodule(around), (nn.Sequential, nn.ModuleList)):
            return outputs[name] if outputs[name].tokens.grid != (1, 1) else None
        name = around
    return None


@contextlib.contextmanager
def warn_of_artefacts(model: nn.Module, survey: Survey) -> Iterator[None]:
    """Warn if the model computes high-norm tokens inside this context. This costs only the norms of one layer."""
    activation = last_block(model, survey)
    if activation is None or activation.tokens.grid[0] * activation.tokens.grid[1] < MIN_TOKENS:
        yield
        return
    with _norms(model, activation) as measured:
        yield
    if measured and (mask := outliers(measured[-1])).any():
        warn(f"{Artefacts(measured[-1], mask, activation.name).report()}; see maps.find_artefacts")


@contextlib.contextmanager
def _norms(model: nn.Module, activation: Activation) -> Iterator[list[Tensor]]:
    """Yield a list that gets the norms, (B, h, w), of each output of a module."""
    measured: list[Tensor] = []
    depth = surveys()

    def measure(module: nn.Module, args: object, out: Tensor | tuple[Tensor, ...] | list[Tensor]) -> None:
        if surveys() != depth:  # skip the passes of a nested survey, which runs if the model picks tokens
            return
        value = (out[0] if isinstance(out, (tuple, list)) else out).detach()
        wide = torch.promote_types(value.dtype, torch.float32)
        norms_B1N = torch.linalg.vector_norm(value, dim=activation.channel_axis, dtype=wide).float()
        measured.append(activation.tokens.to_grid(norms_B1N.flatten(1)[:, None]))

    handle = model.get_submodule(activation.name).register_forward_hook(measure)
    try:
        yield measured
    finally:
        handle.remove()
