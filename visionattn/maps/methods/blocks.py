"""The last blocks of a transformer, and each of them and the layers after them run again by themselves.

A method that needs the score of an earlier block, or of a changed attention output, runs only the rest of a block and
the model's head again. If the head reads the class token alone, and the layers of a block treat each token alone, the
class token alone runs again, which costs little. Both conditions are checked against the first run.

Shapes: B images, N tokens, D channels, W windows, H heads, Q queries, K keys.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.capture import Activation, Args, Call, Func, Interception, Kwargs, Site, Survey, Watcher, run, surveys
from visionattn.errors import DataError, UsageError
from visionattn.maps.method import Target, find_non_finite, pick

_patching = threading.RLock()
"""Held while `forward` of a model's blocks is replaced. Threads that share a model must undo their changes in order."""


class NeedsAllTokens(Exception):  # noqa: N818 - it asks for another way of running, and never reaches the user
    """The class token cannot run alone through this model."""


@dataclass(frozen=True)
class Block:
    """A module with one call of attention, which returns all tokens.

    Attributes:
        name: dotted name of the module.
        site: its call of attention.
        turn: index of the call among the model's calls of attention.
        calls: for every softmax and fused call inside the module, in order, whether it is the call of attention.
        output: the module's output.
    """

    name: str
    site: Site
    turn: int
    calls: tuple[bool, ...]
    output: Activation

    @property
    def alone(self) -> bool:
        """Whether the class token might run alone: a fused call, in which a class token attends to all tokens."""
        site = self.site
        in_order = site.queries is not None and site.queries.in_order and self.output.tokens.in_order
        return site.fused and site.class_query == 0 and in_order and self.output.channel_axis == 2


def last_blocks(survey: Survey) -> list[Block]:
    """Return the longest run of blocks at the end of a model that return the same tokens; empty if there is none."""
    names = [site.name for site in survey.attention]
    outputs: dict[str, list[Activation]] = {}
    for activation in survey.activations:
        outputs.setdefault(activation.name, []).append(activation)
    found: list[Block] = []
    for turn, site in reversed(list(enumerate(survey.attention))):
        parts = site.name.split(".")
        around = [".".join(parts[: count + 1]) for count in range(len(parts))]
        single = [name for name in around if sum(_inside(other, name) for other in names) == 1]
        fitting = [name for name in single if len(outputs.get(name, [])) == 1]
        fitting = [name for name in fitting if site.kind == "self" and _same_tokens(outputs[name][0], site)]
        if not fitting:
            break
        output = outputs[fitting[0]][0]
        if found and (_layout(output) != _layout(found[0].output)):
            break
        calls = tuple(other is site for name, other in survey.sites if _inside(name, fitting[0]))
        found.insert(0, Block(fitting[0], site, turn, calls, output))
    return found


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _same_tokens(output: Activation, site: Site) -> bool:
    return site.queries is not None and output.tokens.grid == site.queries.grid == site.keys.grid


def _layout(output: Activation) -> tuple[object, ...]:
    return output.tokens.grid, output.tokens.index_WN.shape, output.tokens.num_prefix_tokens, output.channel_axis


@dataclass
class Ran:
    """What the first run keeps of a block, of all tokens or of the class token alone.

    Attributes:
        block: the block.
        tokens: its output, (B, N, D), or another layout with the channels at `channel_axis`.
        args, kwargs: its arguments.
        wrap: a function that returns the block's output with other tokens.
        out: the output of the attention, shaped as the model's, of the class token alone; None if all tokens are kept.
        value: the values of the attention, (B, W, H, K, D); None if all tokens are kept.
    """

    block: Block
    tokens: Tensor
    args: Args  # the arguments of a user's module
    kwargs: Kwargs
    wrap: Callable[[Tensor], object]
    out: Tensor | None = None
    value: Tensor | None = None


class Trace(Interception):
    """Runs a model once and keeps what its blocks need to run again.

    Attributes:
        ran: what was kept of each block.

    Args:
        model: the model.
        blocks: its last blocks.
        alone: keep the class token alone.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], *, alone: bool) -> None:
        super().__init__(model)
        self.blocks, self.alone = blocks, alone
        self.ran: list[Ran] = []
        self._turns = {block.turn for block in blocks}
        self._attended: list[tuple[Tensor, Tensor]] = []
        self._given_up = False

    def end(self) -> None:
        if not self._given_up:  # otherwise the later blocks did not run
            super().end()

    def run(self, images_BCHW: Tensor) -> object:
        """Run the model, and return its output."""
        with contextlib.ExitStack() as stack:
            for block in self.blocks:
                module = self.model.get_submodule(block.name)
                keep = _Keep(self, block)
                stack.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
            stack.enter_context(self)
            return run(self.model, images_BCHW)

    def wants(self, site: Site) -> bool:
        return self.alone and self.turn in self._turns

    def attended(self, call: Call, out: Tensor, kept: Tensor | None) -> None:
        assert call.value is not None
        value = call.value.transpose(2, 3).clone(memory_format=torch.contiguous_format).transpose(2, 3)
        self._attended.append((out[..., :1, :].detach().clone(), value))

    def keep(self, block: Block, args: Args, kwargs: Kwargs, out: object) -> None:
        """Keep what a block needs to run again."""
        tokens, wrap = _unwrapped(out)
        if not self.alone:
            self.ran.append(Ran(block, tokens, args, kwargs, wrap))
            return
        others = (*args[1:], *kwargs.values())
        if not args or not isinstance(args[0], Tensor) or any(isinstance(other, Tensor) for other in others):
            self._given_up = True
            raise NeedsAllTokens  # e.g. rotary positions, which have one row for each token
        attended, value = self._attended.pop()
        first = (args[0][:, :1].clone(), *args[1:])
        self.ran.append(Ran(block, tokens[:, :1].clone(), first, kwargs, wrap, attended, value))

    def skip(self, block: Block, out: object) -> None:
        """Keep of a block only how to skip it."""
        tokens, wrap = _unwrapped(out)
        self.ran.append(Ran(block, tokens[:0], (), {}, wrap))


class _Keep:
    """A hook that keeps what a block needs to run again."""

    def __init__(self, trace: Trace, block: Block) -> None:
        self.trace, self.block, self.thread = trace, block, threading.get_ident()
        self.depth = surveys()

    def __call__(self, module: nn.Module, *given: Any) -> None:
        if threading.get_ident() == self.thread and surveys() == self.depth:
            args, kwargs, out = given  # torch may call the hook in other threads without the keyword arguments
            self.trace.keep(self.block, args, kwargs, out)


def _unwrapped(out: Any) -> tuple[Tensor, Callable[[Tensor], object]]:
    """Return the tokens in a module's output, and a function that puts other tokens in their place."""
    if isinstance(out, (tuple, list)):
        return out[0], lambda tokens: type(out)((tokens, *out[1:]))
    return out, lambda tokens: tokens


class _Again(Watcher):
    """Runs a block again, with a leaf of the autograd graph as the output of its attention.

    Attributes:
        leaf: the output of the fused call, or the weights of the softmax.
        call: the call of attention; None if its output was given.
    """

    def __init__(self, model: nn.Module, block: Block, leaf: Tensor | None) -> None:
        super().__init__(model.get_submodule(block.name))
        self.block, self.leaf, self.call = block, leaf, None
        self._calls = iter(block.calls)

    leaf: Tensor | None
    call: Call | None

    def fused(self, func: Func, args: Args, kwargs: Kwargs) -> object:
        if not next(self._calls, False):
            return func(*args, **kwargs)
        if self.leaf is None:
            self.call = Call.fused(self.block.site, args, kwargs)
            self.leaf = func(*args, **kwargs).detach().requires_grad_()
        return self.leaf.clone()  # an in-place operation on the leaf itself would fail

    def softmax(self, func: Func, args: Args, kwargs: Kwargs) -> object:
        if not next(self._calls, False):
            return func(*args, **kwargs)
        self.leaf = func(*args, **kwargs).detach().requires_grad_()
        assert self.leaf is not None
        self.call = Call.eager(self.block.site, self.leaf)
        return self.leaf.clone()


def run_again(model: nn.Module, ran: Ran, leaf: Tensor | None = None) -> tuple[Tensor, Tensor, Call | None]:
    """Run a block again with gradients, from the output of its attention on.

    Args:
        model: the model.
        ran: the record of the block's first run.
        leaf: the output of the attention (default: the same as in the first run). Its first axis may be a multiple of
            the number of images.

    Returns:
        The tokens that the block returns, the output of its attention (the weights if a softmax computes them) as a
        leaf of the graph, and the call of attention, unless its output was given.

    Raises:
        NeedsAllTokens: the class token cannot run alone through the block.
        UsageError: the block returns other tokens than in the first run.
        DataError: its tokens hold NaN or infinity.
    """
    module, args, kwargs = model.get_submodule(ran.block.name), ran.args, ran.kwargs
    given = leaf
    if leaf is None and ran.out is not None:
        leaf = ran.out.detach().requires_grad_()
    if given is not None and ran.out is not None and len(given) != len(ran.out):
        args = (torch.cat([args[0]] * (len(given) // len(ran.out))), *args[1:])
    try:
        with torch.enable_grad(), _Again(model, ran.block, leaf) as again:
            tokens, _ = _unwrapped(module(*args, **kwargs))
    except (IndexError, RuntimeError, ValueError, TypeError) as error:
        if ran.out is not None and not isinstance(error, (UsageError, torch.OutOfMemoryError)):
            raise NeedsAllTokens from error
        raise
    assert again.leaf is not None
    if given is None and not close(tokens, ran.tokens):
        if not ran.tokens.isfinite().all():
            raise DataError(f"the tokens that {ran.block.name} returns are not finite; {find_non_finite(model)}")
        if ran.out is not None:
            raise NeedsAllTokens
        raise UsageError(f"{ran.block.name} returns other tokens when it runs a second time, so use rollout or chefer")
    return tokens, again.leaf, again.call


def close(found: Tensor, expected: Tensor) -> bool:
    """Return whether two results are equal up to rounding."""
    if found.shape != expected.shape:
        return False
    half = expected.dtype in (torch.float16, torch.bfloat16)
    found, expected = found.detach().float(), expected.detach().float()
    tolerance = (5e-2 if half else 1e-3) * float(expected.abs().amax()) + torch.finfo(torch.float32).tiny
    return bool((found - expected).abs().amax() <= tolerance)


def read_out(
    model: nn.Module, images_BCHW: Tensor, ran: Sequence[Ran], tokens: Tensor, score: Callable[[object], Tensor]
) -> Tensor:
    """Return the scores for other tokens of the last block: only the layers after the last block run.

    Args:
        model: the model.
        images_BCHW: its input. The layers before the first block run with the first image, and their output is unused.
        ran: the records of the blocks' first run.
        tokens: the output of the last block, of any number of images.
        score: a function from the model's output to the scores, one for each image.

    Raises:
        NeedsAllTokens: the class token alone was given, and the layers after the blocks need more.
        UsageError: these layers cannot run by themselves.
    """
    reason = "they return another number of images"
    # a model may use the number of its input images again after the blocks, so the second try has as many images
    for images in (images_BCHW[:1], images_BCHW[:1].expand(len(tokens), -1, -1, -1)):
        try:
            with _patching, contextlib.ExitStack() as stack:
                for each in ran:
                    stack.enter_context(_skipped(model, each, tokens if each is ran[-1] else None))
                with torch.enable_grad():
                    score_N = score(model(images))
            if len(score_N) == len(tokens):
                return score_N
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError, ValueError, TypeError) as error:  # a UsageError is a ValueError
            reason = str(error).strip().partition("\n")[0]
    if ran[-1].out is not None:
        raise NeedsAllTokens
    raise UsageError(
        f"the layers after {ran[-1].block.name} of this {type(model).__name__} cannot run by themselves ({reason}); "
        "use chefer"
    )


def require_same_score(method: str, model: nn.Module, last: Ran, found_B: Tensor, score_B: Tensor) -> None:
    """Check that the score of the last block's tokens, `found_B`, is the model's score.

    Raises:
        UsageError: it is another one, so the score also depends on other layers.
        DataError: the score is NaN or infinite.
    """
    if close(found_B, score_B):
        return
    if not score_B.isfinite().all():
        raise DataError(f"the score to explain is not finite; {find_non_finite(model)}")
    raise UsageError(
        f"{method} needs a score that depends only on the tokens of the last block, {last.block.name}, and this "
        f"{type(model).__name__} also uses others; use chefer"
    )


@contextlib.contextmanager
def _skipped(model: nn.Module, ran: Ran, tokens: Tensor | None) -> Iterator[None]:
    """Make a block return these tokens in this thread, or its input if they are None, without computing anything."""
    module, thread = model.get_submodule(ran.block.name), threading.get_ident()
    own, before = "forward" in vars(module), module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return before(*args, **kwargs)
        return ran.wrap(tokens if tokens is not None else args[0] if args else next(iter(kwargs.values())))

    module.forward = forward
    try:
        yield
    finally:
        if own:
            module.forward = before
        else:
            del module.forward


def score_of(target: Target, output: object) -> Tensor:
    """Return the scores of a target, (B,); see `pick`."""
    return pick(output, target)[0]
