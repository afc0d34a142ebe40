"""High-norm tokens: patches that a transformer has taken for its own use, where maps show what does not lie there.

Darcet et al. 2024, "Vision transformers need registers", 2309.16588, §2. Attention goes to these patches whatever the
picture shows; register tokens, which models are trained with against them, are never on the grid.

Shapes: B images, N tokens, C channels, h × w grid.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.capture.hooks import surveys
from visionattn.capture.running import look, run, undisturbed
from visionattn.capture.survey import Survey
from visionattn.capture.token_layout import Activation
from visionattn.errors import UsageError, warn
from visionattn.maps.method import check_images

RATIO, MOST, FEWEST = 3.0, 0.1, 64


@dataclass(frozen=True)
class Artefacts:
    """What was found in a batch.

    Attributes:
        norms: (B, h, w) float32, length of each patch's token behind the last block.
        mask: (B, h, w) bool, the artefacts.
        source: name of the block.
    """

    norms: Tensor
    mask: Tensor
    source: str

    def report(self) -> str:
        """Say how many there are, and how much longer than the others."""
        count, images = int(self.mask.sum()), int(self.mask.flatten(1).any(1).sum())
        if not count:
            return f"no high-norm tokens behind {self.source}"
        times = (self.norms[self.mask].mean() / self.norms[~self.mask].mean()).item()
        return (
            f"{count} high-norm tokens behind {self.source} in {images} of {len(self.mask)} images, {times:.1f} times "
            "as long as the others: what is shown there is not of the image (2309.16588)"
        )


def find_artefacts(model: nn.Module, images_BCHW: Tensor, *, layer: str | None = None) -> Artefacts:
    """Find the patches whose tokens are far longer than the others'.

    Args:
        model: a transformer of one grid throughout: ViT, DeiT, DINOv2, CLIP …
        images_BCHW: normalised as the model wants it.
        layer: name of the module whose output is looked at; None for the block of the last attention.

    Raises:
        UsageError: the model has no such block, or its output does not lie on a grid.
    """
    check_images(images_BCHW)
    with undisturbed(model) as bare:
        images_BCHW = images_BCHW.clone() if images_BCHW.is_inference() else images_BCHW.detach()
        activation = last_block(bare, look(bare, images_BCHW), layer)
        if activation is None:
            what = "has no block of attention whose tokens lie" if layer is None else f"has no {layer!r} that lies"
            raise UsageError(f"this {type(bare).__name__} {what} on a grid; high-norm tokens are those of a ViT")
        with _norms(bare, activation) as seen:
            run(bare, images_BCHW)
    return Artefacts(seen[-1], outliers(seen[-1]), activation.name)


def outliers(norms_Bhw: Tensor) -> Tensor:
    """Tell which tokens are artefacts, (B, h, w): those longer than three times their image's median, if they are few.

    The paper reads its threshold off a histogram whose two humps lie apart (150 for DINOv2-g, whose others are about
    50); here it follows each image. More than a tenth of an image is no artefact (in the paper 2.4 %), and nothing is
    said of fewer than 64 tokens.
    """
    flat_BN = norms_Bhw.flatten(1)
    found_BN = flat_BN > RATIO * flat_BN.median(1, keepdim=True).values
    few_B1 = found_BN.float().mean(1, keepdim=True) <= MOST
    if flat_BN.shape[1] < FEWEST:
        few_B1 = torch.zeros_like(few_B1)
    return (found_BN & few_B1).reshape(norms_Bhw.shape)


def last_block(model: nn.Module, found: Survey, layer: str | None = None) -> Activation | None:
    """The output of the block in which a model attends last: the nearest module around it that is one of a list."""
    outputs = {activation.name: activation for activation in found.activations}
    if layer is not None:
        return outputs.get(layer)
    if not found.attention or found.attention[-1].windowed or found.attention[-1].queries is None:
        return None
    name = found.attention[-1].name
    while name:
        around = name.rpartition(".")[0]
        if name in outputs and isinstance(model.get_submodule(around), (nn.Sequential, nn.ModuleList)):
            return outputs[name] if outputs[name].tokens.grid != (1, 1) else None
        name = around
    return None


@contextlib.contextmanager
def warned(model: nn.Module, found: Survey) -> Iterator[None]:
    """Warn of the artefacts in what the model computes meanwhile; at the cost of the norms of one layer."""
    activation = last_block(model, found)
    if activation is None or activation.tokens.grid[0] * activation.tokens.grid[1] < FEWEST:
        yield
        return
    with _norms(model, activation) as seen:
        yield
    if seen and (mask := outliers(seen[-1])).any():
        warn(f"{Artefacts(seen[-1], mask, activation.name).report()}; see maps.find_artefacts")


@contextlib.contextmanager
def _norms(model: nn.Module, activation: Activation) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    depth = surveys()

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        if surveys() != depth:  # where tokens are picked, every image is surveyed meanwhile
            return
        value = (out[0] if isinstance(out, (tuple, list)) else out).detach()
        wide = torch.promote_types(value.dtype, torch.float32)
        norms_B1N = torch.linalg.vector_norm(value, dim=activation.channel_axis, dtype=wide).float()
        seen.append(activation.tokens.to_grid(norms_B1N.flatten(1)[:, None]))

    handle = model.get_submodule(activation.name).register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
