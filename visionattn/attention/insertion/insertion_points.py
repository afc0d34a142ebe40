"""Find the modules after which a mechanism can be inserted, and the ends of a network's stages, blocks and branches.

The layouts of feature maps are measured, without a table of networks: two images that differ only inside a rectangle
run through the network once. If the shape of an output fits several layouts, the chosen layout is one in which the two
outputs differ at the rectangle. If no layout of the tokens fulfils this, the tokens are not in row order, and nothing
can be inserted after them.

Shapes: B batch, C channels, H rows and W columns of the image, h rows and w columns of the grid, N tokens.
"""

import contextlib
import copy
import fnmatch
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from visionattn.data import image_shape
from visionattn.errors import UsageError, first_line, nearest

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)
_ADDITIONS = frozenset(["add", "add_", "__add__", "__radd__", "__iadd__"])
_MAX_PREFIX = 16  # class and register tokens; the networks of timm have fewer
_ROWS, _COLUMNS = (0.25, 0.375), (0.625, 0.75)  # the rectangle, as fractions of the image; a flip or transpose moves it


@dataclass(frozen=True)
class Layout:
    """How the output of a module stores a feature map.

    Attributes:
        channels: C.
        grid: (h, w), for images of the example's size.
        channel_axis: 1 for (B, C, h, w), −1 for (B, h, w, C) and for tokens (B, N, C).
        num_prefix_tokens: number of tokens before the grid; None if the output is not tokens.
        item: index in the output if that is a tuple; None if the output is the tensor itself.
    """

    channels: int
    grid: tuple[int, int]
    channel_axis: int
    num_prefix_tokens: int | None = None
    item: int | None = None

    def to_maps(self, x: Tensor) -> Tensor:
        """Convert the output, without its prefix tokens, to (B, C, h, w)."""
        if self.num_prefix_tokens is not None:
            grid_BNC = x[:, self.num_prefix_tokens :]
            return grid_BNC.transpose(1, 2).unflatten(2, self._grid_of(grid_BNC.shape[1]))
        return x if self.channel_axis == 1 else x.permute(0, 3, 1, 2)

    def from_maps(self, maps_BChw: Tensor, x: Tensor) -> Tensor:
        """Convert (B, C, h, w) to the form of the output `x`; the prefix tokens are taken from `x`."""
        if self.num_prefix_tokens is not None:
            grid_BNC = maps_BChw.flatten(2).transpose(1, 2)
            prefix = self.num_prefix_tokens
            return torch.cat([x[:, :prefix], grid_BNC], 1) if prefix else grid_BNC
        return maps_BChw if self.channel_axis == 1 else maps_BChw.permute(0, 2, 3, 1)

    def _grid_of(self, count: int) -> tuple[int, int]:
        """Return the grid of `count` tokens, for larger or smaller images of the same aspect ratio."""
        height, width = self.grid
        if count == height * width:
            return self.grid
        scale = (count / (height * width)) ** 0.5
        height, width = round(height * scale), round(width * scale)
        if height * width != count:
            raise UsageError(
                f"{count} tokens do not form a grid with the aspect ratio of {self.grid[0]}×{self.grid[1]}, for which "
                "attention was inserted; insert it again with image= an example of your images"
            )
        return height, width


@dataclass
class _Output:
    """The output of one module: its layout and tensor, or the reason why nothing can be inserted after the module.

    `opens` is True if insertion points may be found inside the module.
    """

    layout: Layout | None
    reason: str = ""
    tensor: Tensor | None = None
    opens: bool = False


class Places:
    """The outputs of a network's modules for two images, in the order in which the modules finished.

    Args:
        model: the network. A copy runs, so that the network's caches and buffers do not change.
        image: (C, H, W) or (1, C, H, W), an example of the input (default: the size that the model is configured for).
        skip: modules of this class, and the modules inside them, are ignored.

    Raises:
        UsageError: the network cannot be copied, or does not run on the image.
    """

    def __init__(self, model: nn.Module, image: Tensor | None = None, *, skip: type[nn.Module]) -> None:
        self.kind = type(model).__name__
        reference = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        self.images_BCHW = _two_images(image_shape(model) if image is None else image.shape[-3:]).to(reference)
        self.image_size = (self.images_BCHW.shape[2], self.images_BCHW.shape[3])
        try:
            self._model = copy.deepcopy(model).eval()
        except (RuntimeError, TypeError) as error:  # e.g. the model stores a tensor that has a grad_fn
            raise UsageError(
                f"this {self.kind} cannot be copied for measuring ({first_line(error)}); "
                "if the network caches tensors, call model.train() first, which drops them"
            ) from error
        _randomise_zeros(self._model)
        self._skipped = {part for outer in self._model.modules() if isinstance(outer, skip) for part in outer.modules()}
        named = self._model.named_modules()
        self.modules = {name: module for name, module in named if name and module not in self._skipped}
        self._outputs: dict[str, _Output] = {}
        self._flow = _Flow()
        for name, module in self.modules.items():
            module.register_forward_hook(self._note_as(name))
        try:
            with torch.inference_mode(False), torch.enable_grad():
                image_BCHW = self.images_BCHW.requires_grad_().clone()  # a network may change its input in place
                with self._flow.of(image_BCHW):
                    self._output = self._model(image_BCHW)
        except (AssertionError, RuntimeError, ValueError, TypeError, IndexError) as error:
            size = "×".join(map(str, self.images_BCHW.shape[1:]))
            raise UsageError(
                f"this {self.kind} does not run on an image of {size} ({first_line(error)}); "
                "pass image= a tensor (C, H, W) that the network accepts"
            ) from error

    def layout(self, name: str) -> Layout:
        """Return the layout of a module's output.

        Raises:
            UsageError: nothing can be inserted after the module.
        """
        measured = self._outputs.get(name)
        if measured is None:
            raise UsageError(f"nothing can be inserted after {name} of this {self.kind}: it is not called as a module")
        if measured.layout is None:
            raise UsageError(f"nothing can be inserted after {name} of this {self.kind}: it {measured.reason}")
        return measured.layout

    def output(self, name: str) -> Tensor:
        """Return a module's output for the two images, detached; `layout` describes this tensor."""
        output = self._outputs[name].tensor
        assert output is not None
        return output.detach()

    def holder(self, name: str) -> tuple[str, str]:
        """Return the module that holds a mechanism inserted after `name`, and the module to hook.

        A Sequential would run an added child as one of its items, so the Sequential's last item becomes the holder. If
        possible, this item is hooked too: some networks recompute activations by calling the items one by one.
        """
        keeper, hooked = name, name
        while isinstance(module := self.modules[keeper], _CONTAINERS) and len(module):
            runs_items = type(module).forward is nn.Sequential.forward
            *_, last = module._modules
            keeper = f"{keeper}.{last}"
            hooked = (
                keeper if runs_items and hooked == keeper.rpartition(".")[0] and self._has_layout(keeper) else hooked
            )
        return keeper, hooked

    def stages(self) -> list[str]:
        """Find the end of each stage: the last module with blocks before the resolution changes.

        A network with a single resolution, such as a plain ViT, is divided into four stages with equally many blocks
        (as in Li et al. 2022, 2203.16527, section 3).
        """
        trunk, blocks = self._trunk(""), self._blocks()
        holding = [name for name in trunk if any(block == name or _inside(block, name) for block in blocks)]
        holding = holding or [name for name in trunk if self._has_blocks(name)]
        if not blocks:  # stages of single layers, as in VGG
            holding = holding or trunk
        runs = [list(run) for _, run in itertools.groupby(holding, key=self._grid)]
        runs = [run for run in runs if any(map(self._layers, run))]
        if len(runs) > 1:
            return self._reaching([run[-1] for run in runs])
        blocks = blocks or holding
        count = min(4, len(blocks))
        return self._reaching([blocks[len(blocks) * (part + 1) // count - 1] for part in range(count)])

    def blocks(self) -> list[str]:
        """Find the items of Sequentials and ModuleLists that have at least two layers with weights.

        An item is not a block if it contains another such item with the same output shape. Of the remaining items, only
        the outermost are blocks.
        """
        return self._reaching(self._blocks())

    def _blocks(self) -> list[str]:
        items = [
            name for name in self._measured() if isinstance(self._parent(name), _CONTAINERS) and self._layers(name) > 1
        ]
        blocks = [
            name
            for name in items
            if not any(_inside(other, name) and self._shape(other) == self._shape(name) for other in items)
        ]
        return [name for name in blocks if not any(_inside(name, other) for other in blocks)]

    def branches(self) -> list[str]:
        """Find the ends of the residual branches: if two maps are added, the module whose map took more operations."""
        ends = []
        for names in self._flow.branches:
            weighted = [name for name in names if next(self.modules[name].parameters(), None) is not None]
            ends += [name for name in (weighted[-1:] or names[:1]) if self._has_layout(name)]
        return self._reaching(list(dict.fromkeys(ends)))

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """Find modules by name; `*` stands for one part of a dotted name, or for some characters of a part.

        Raises:
            UsageError: a pattern matches no module, or a module after which nothing can be inserted.
        """
        matched: set[str] = set()
        for pattern in patterns:
            parts = pattern.split(".")
            names = [name for name in self.modules if _matches(name.split("."), parts)]
            if not names:
                raise UsageError(
                    f"no module of this {self.kind} is named {pattern!r}.{nearest(pattern, self.modules)} "
                    "Use * for one part of a name, or 'stages', 'blocks' or 'branches' without a name."
                )
            for name in names:
                self.layout(name)
            matched.update(names)
        return [name for name in self._outputs if name in matched]

    # Internals ------------------------------------------------------------------------------------------------------

    def _note_as(self, name: str) -> Callable[[nn.Module, object, object], object]:
        def note(module: nn.Module, args: object, output: object) -> object:
            if name in self._outputs:
                self._outputs[name] = _Output(None, "runs more than once for an image")
                return output
            if type(output) is tuple:
                # return views: only later modules use them, so a view with a gradient affects the network's output
                new = {id(tensor): tensor for tensor in _tensors(output) if not _holds(args, tensor)}
                views = {key: tensor.view_as(tensor) for key, tensor in new.items()}
                output = tuple(views.get(id(item), item) for item in output)
            self._outputs[name] = self._measure(output, args)
            self._flow.made(name, output)
            return output

        return note

    def _measure(self, output: object, inputs: object) -> _Output:
        if type(output) is tuple:
            for item, tensor in enumerate(output):
                if not isinstance(tensor, Tensor) or _holds(inputs, tensor):
                    continue  # the module passes this input through unchanged
                layout = _layout(tensor, self.images_BCHW, item)
                if layout:
                    return _Output(layout, tensor=tensor)
            return _Output(None, "returns a tuple without a feature map")
        if not isinstance(output, Tensor):
            return _Output(None, f"returns a {type(output).__name__}; name a module inside it")
        layout = _layout(output, self.images_BCHW)
        if layout:
            return _Output(layout, tensor=output)
        reason = f"returns a tensor {tuple(output.shape)} for two images, which is not a feature map in row order"
        return _Output(None, reason, opens=True)

    def _reaching(self, names: list[str]) -> list[str]:
        """Drop modules that do not affect the output, such as modules after the last attention to the class token."""
        outputs = {name: output for name in names if (output := self._outputs[name].tensor) is not None}
        known = [name for name, output in outputs.items() if output.requires_grad]
        with torch.inference_mode(False), torch.enable_grad():
            totals = [tensor.float().square().sum() for tensor in _tensors(self._output) if tensor.requires_grad]
            if not totals or not known:
                return names
            inputs = [outputs[name] for name in known]
            gradients = torch.autograd.grad(totals, inputs, retain_graph=True, allow_unused=True)
        dead = {
            name
            for name, gradient in zip(known, gradients, strict=True)
            if gradient is None or not self.layout(name).to_maps(gradient).any()
        }
        return names if len(dead) == len(names) else [name for name in names if name not in dead]

    def _trunk(self, name: str) -> list[str]:
        """List the modules that run one after the other; one that changes the resolution is split into parts."""
        module = self.modules[name] if name else self._model
        children = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
        children = [child for child in children if child in self.modules]
        alone = sum(self._layers(child) > 0 for child in children) == 1
        trunk = []
        for child in children:
            measured = self._outputs.get(child)
            if measured is not None and measured.layout is None and not measured.opens:
                continue  # the module returns a list of maps, or runs several times
            inner = self._trunk(child)
            if isinstance(self.modules[child], _CONTAINERS):
                opens = len(set(map(self._grid, inner))) > 1
            else:  # a block stays whole; a wrapper whose blocks differ in resolution is split up
                opens = alone and len({self._grid(part) for part in inner if self._has_blocks(part)}) > 1
            trunk += [child] if self._has_layout(child) and not opens else inner
        order = {part: place for place, part in enumerate(self._outputs)}
        return sorted(trunk, key=lambda part: order[part])

    def _measured(self) -> list[str]:
        return [name for name in self._outputs if self._has_layout(name)]

    def _has_layout(self, name: str) -> bool:
        return name in self._outputs and self._outputs[name].layout is not None

    def _grid(self, name: str) -> tuple[int, int]:
        return self.layout(name).grid

    def _shape(self, name: str) -> tuple[int, tuple[int, int]]:
        return self.layout(name).channels, self.layout(name).grid

    def _parent(self, name: str) -> nn.Module:
        parent = name.rpartition(".")[0]
        return self.modules[parent] if parent else self._model

    def _has_blocks(self, name: str) -> bool:
        """Return whether a module is, or contains, a module with several layers that is not just a container."""
        inside = [self.modules[other] for other in self.modules if other == name or _inside(other, name)]
        return any(not isinstance(m, _CONTAINERS) and _count_layers(m, self._skipped) > 1 for m in inside)

    def _layers(self, name: str) -> int:
        """Count the layers with weights in a module."""
        return _count_layers(self.modules[name], self._skipped)


class _Flow(TorchFunctionMode):
    """Find residual additions, and compute every tensor's depth: the number of operations between image and tensor.

    Attributes:
        branches: for each addition of maps of two depths, the modules that returned the deeper map, innermost first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.branches: list[list[str]] = []
        self._depth: dict[int, int] = {}
        self._makers: dict[int, list[str]] = {}
        self._kept: list[Tensor] = []  # keeps tensors alive, so that Python does not reuse their ids

    @contextlib.contextmanager
    def of(self, image: Tensor) -> Iterator[None]:
        """Record the operations on an image while the context is active."""
        self._set(image, 0)
        with self:
            yield
        self._kept.clear()
        self._depth.clear()
        self._makers.clear()

    def made(self, name: str, output: object) -> None:
        """Record which tensors a module returned."""
        for tensor in _tensors(output):
            self._makers.setdefault(id(tensor), []).append(name)
            self._kept.append(tensor)

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: Any = None
    ) -> object:
        inputs = [tensor for tensor in _tensors((args, kwargs)) if id(tensor) in self._depth]
        depths = [self._depth[id(tensor)] for tensor in inputs]
        addition = getattr(func, "__name__", "") in _ADDITIONS and len(set(depths)) == 2
        deeper = max(inputs, key=lambda tensor: self._depth[id(tensor)]) if addition else None
        makers = self._makers.get(id(deeper))
        if deeper is not None and makers and inputs[0].shape == inputs[1].shape:
            self.branches.append(list(makers))
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output) if inputs else ():
            self._set(tensor, max(depths) + 1)
            if addition:
                self._makers.pop(id(tensor), None)  # an addition in place: no longer the module's output
        return output

    def _set(self, tensor: Tensor, depth: int) -> None:
        self._depth[id(tensor)] = depth
        self._kept.append(tensor)


def _layout(output: Tensor, images_BCHW: Tensor, item: int | None = None) -> Layout | None:
    """Return the first layout in which the outputs for the two images differ mostly where the images differ."""
    if len(output) != len(images_BCHW) if output.ndim else True:
        return None
    height, width = images_BCHW.shape[2:]
    candidates = []
    if output.ndim == 4:
        for axis, (rows, columns) in ((1, output.shape[2:]), (-1, output.shape[1:3])):
            if abs(rows * width - columns * height) <= max(height, width):  # the image's aspect ratio, up to a cell
                candidates.append(Layout(output.shape[axis], (rows, columns), axis, None, item))
    elif output.ndim == 3:
        grids = {(height // s, width // s) for s in range(1, min(height, width) + 1)}
        grids |= {(-(-height // s), -(-width // s)) for s in range(1, min(height, width) + 1)}
        for rows, columns in sorted(grids, reverse=True):
            prefix = output.shape[1] - rows * columns
            if 0 <= prefix <= _MAX_PREFIX:
                candidates.append(Layout(output.shape[2], (rows, columns), -1, prefix, item))
    candidates = [layout for layout in candidates if min(layout.grid) > 1]
    candidates.sort(key=lambda layout: layout.num_prefix_tokens or 0)
    for layout in candidates:
        if _agreement(layout, output) > 0.5:
            return layout
    # the shape alone identifies a map (B, C, h, w), but not the grid of tokens, which can have any order
    return candidates[0] if candidates and output.ndim == 4 else None


@torch.no_grad()
def _agreement(layout: Layout, output: Tensor) -> float:
    """Return how much of the difference between the two outputs lies in the rectangle's cells, in [0, 1].

    The rectangle has n cells. The result is the mean difference in these cells, divided by the mean over the n cells of
    the whole grid that differ most. It is 1 if no cells outside differ more. With random weights, after the blocks of
    19 families of timm with tokens in row order, the result is at least .82 and mostly 1. In Hiera, whose tokens are in
    another order, the result is .03 after the first stage and .06 after the second.
    """
    maps_BChw = layout.to_maps(output.detach()).float()
    change_hw = (maps_BChw[0] - maps_BChw[1]).abs().sum(0)
    rows, columns = (
        slice(int(low * count), max(int(low * count) + 1, -int(-high * count // 1)))
        for (low, high), count in zip((_ROWS, _COLUMNS), layout.grid, strict=True)
    )
    inside = change_hw[rows, columns]
    most = change_hw.flatten().topk(inside.numel()).values.mean()
    return float(inside.mean() / most) if most > 0 else 0.0


@torch.no_grad()
def _randomise_zeros(model: nn.Module) -> None:
    """Replace weights that are all zero by noise, since a branch of zeros would hide the images' difference."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def _count_layers(module: nn.Module, skipped: set[nn.Module]) -> int:
    return sum(isinstance(part, _WEIGHTED) and part not in skipped for part in module.modules())


def _two_images(shape: Sequence[int]) -> Tensor:
    """Return an image of noise, and the same image with other noise in the rectangle."""
    generator = torch.Generator().manual_seed(0)
    first, other = torch.randn(2, *shape, generator=generator)
    rows, columns = (
        slice(int(low * count), max(int(low * count) + 1, int(high * count)))
        for (low, high), count in zip((_ROWS, _COLUMNS), shape[1:], strict=True)
    )
    second = first.clone()
    second[:, rows, columns] = other[:, rows, columns]
    return torch.stack([first, second])


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _holds(value: object, tensor: Tensor) -> bool:
    return any(part is tensor for part in _tensors(value))


def _matches(name: list[str], pattern: list[str]) -> bool:
    return len(name) == len(pattern) and all(map(fnmatch.fnmatchcase, name, pattern))


def _inside(name: str, other: str) -> bool:
    return name.startswith(f"{other}.")
