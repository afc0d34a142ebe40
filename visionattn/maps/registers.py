"""Registers for ViTs that were trained without: find the neurons that make high-norm tokens, and move their activation.

Shapes: B images, N tokens, M neurons, h × w grid.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from visionattn.attention import RegisterToken, TokenPath, token_path
from visionattn.capture import run, undisturbed
from visionattn.errors import DataError, UsageError
from visionattn.maps.artefacts import RATIO, Artefacts, find_artefacts

_COUNTS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50)
_MAX_LEFT = 0.1  # fraction of high-norm tokens that the default number of neurons may leave


@dataclass(frozen=True, repr=False)
class Registers:
    """A register that `add_registers` put into a model.

    Attributes:
        token: the register; `token.neurons` are the neurons that it took over.
        before, after: the high-norm tokens of the images without and with the register.
    """

    token: RegisterToken
    before: Artefacts
    after: Artefacts

    def remove(self) -> None:
        """Restore the model bit by bit. A second call has no effect."""
        self.token.remove()

    def __enter__(self) -> "Registers":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        count = sum(map(len, self.token.neurons.values()))
        before, after = (100 * float(found.mask.float().mean()) for found in (self.before, self.after))
        return (
            f"a register for {count} neurons: high norms in {before:.1f} % of patches without it, {after:.1f} % with it"
        )


def add_registers(model: nn.Module, images_BCHW: Tensor, *, count: int | None = None) -> Registers:
    """Find the neurons that make high-norm tokens, and move their activation into an extra token, in place.

    Test-time registers (Jiang et al. 2025, 2506.08010, algorithm 1): the high-norm tokens of large ViTs come from few
    neurons of the feed-forward layers. If these neurons are active in an extra token only, the patches keep their local
    content, and heatmaps show the image there.

    Neurons are ranked by their contribution at the high-norm tokens, minus that at the other patches: the mean of
    |a_n| ‖w_n‖, where a_n is the activation of the neuron and w_n its weights in the next linear layer. Only blocks up
    to the one whose output first has the high norms count. Deviations from the paper: it ranks by the mean activation
    alone, and takes a fixed number of neurons for each model.

    Args:
        model: a ViT of timm (without rotary embeddings), torchvision or transformers (ViT, DINOv2), or a model that
            contains one.
        images_BCHW: images, normalised for the model, some with high-norm tokens; a few dozen are enough.
        count: number of neurons (default: the fewest of 1, 2, 3, 5 … 50 that leave at most a tenth of the high-norm
            tokens of these images).

    Returns:
        The register. `remove()` restores the model.

    Raises:
        UsageError: the model has no such ViT, or count is below 1.
        DataError: no token of these images has a high norm, or no number of neurons removes the high norms.
    """
    if count is not None and count < 1:
        raise UsageError(f"count must be at least 1, got {count}")
    path = token_path(model)
    before = find_artefacts(model, images_BCHW)
    if not before.mask.any():
        raise DataError(
            f"{before.report()}, so these images need no register; give images in which some tokens have one"
        )
    ranked = _ranked(model, images_BCHW, before, path)
    for number in _COUNTS if count is None else (count,):
        neurons: dict[str, list[int]] = {}
        for name, index in ranked[:number]:
            neurons.setdefault(name, []).append(index)
        token = RegisterToken(model, neurons)
        try:
            after = find_artefacts(model, images_BCHW)
        except BaseException:
            token.remove()
            raise
        if count is not None or int(after.mask.sum()) <= _MAX_LEFT * int(before.mask.sum()):
            return Registers(token, before, after)
        token.remove()
    raise DataError(
        f"moving {_COUNTS[-1]} neurons leaves more than a tenth of the high-norm tokens, so no few neurons make them; "
        "give count to move a number of your choice"
    )


def _ranked(model: nn.Module, images_BCHW: Tensor, artefacts: Artefacts, path: TokenPath) -> list[tuple[str, int]]:
    """Return (linear layer, neuron) of the blocks up to the first high norms, in the order of their contribution."""
    high_BN = artefacts.mask.flatten(1)
    scores: list[tuple[float, str, int]] = []
    appeared = False

    def score(name: str, args: tuple[Any, ...]) -> None:
        if not appeared:
            length_M = path.linears[name].weight.detach().float().norm(dim=0)
            patches_BNM = args[0].detach()[:, -high_BN.shape[1] :].float().abs() * length_M
            row_M = patches_BNM[high_BN].mean(0) - patches_BNM[~high_BN].mean(0)
            scores.extend((value, name, index) for index, value in enumerate(row_M.tolist()))

    def compare(out: Any) -> None:
        nonlocal appeared
        tokens = out[0] if isinstance(out, (tuple, list)) else out
        norms_BN = tokens.detach()[:, -high_BN.shape[1] :].float().norm(dim=2)
        appeared |= bool(norms_BN[high_BN].mean() > RATIO * norms_BN[~high_BN].mean())

    with contextlib.ExitStack() as stack:
        bare = stack.enter_context(undisturbed(model))
        for name, linear in path.linears.items():
            handle = linear.register_forward_pre_hook(lambda module, args, name=name: score(name, args))
            stack.callback(handle.remove)
            handle = path.blocks[name].register_forward_hook(lambda module, args, out: compare(out))
            stack.callback(handle.remove)
        run(bare, images_BCHW)
    return [(name, index) for _, name, index in sorted(scores, key=lambda item: -item[0])]
