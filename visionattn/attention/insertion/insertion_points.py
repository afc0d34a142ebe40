"""Find the modules of a network after which a mechanism can be inserted, and the ends of stages, blocks and branches.

Everything is measured, without a table of networks: two images that differ in one rectangle run through the network
once. The shape of an output may allow several layouts; the chosen layout places the difference of the two outputs at
the rectangle. If no layout of the tokens does, they are not in row order, and are refused.

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
from visionattn.errors import UsageError, nearest

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)
_ADDITIONS = frozenset(["add", "add_", "__add__", "__radd__", "__iadd__"])
_MAX_PREFIX = 16  # class and register tokens; the networks of timm have fewer
_ROWS, _COLUMNS = (0.25, 0.375), (0.625, 0.75)  # the rectangle; it does not overlap its own mirror images


@dataclass(frozen=True)
class Layout:
    """How the output of a module stores a feature map.

    Attributes:
        channels: C.
        grid: (h, w), for images of the measured size.
        channel_axis: 1 for (B, C, h, w), −1 for (B, h, w, C) and for tokens (B, N, C).
        num_prefix_tokens: tokens before those of the grid; None if the output is not tokens.
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
                f"{count} tokens do not form a grid in the shape of {self.grid[0]}×{self.grid[1]}, for which attention "
                "was inserted; insert it with image= an example of the size that you use"
            )
        return height, width


@dataclass
class _Output:
    """The output of one module: its layout and tensor, or the reason why nothing can be inserted after the module.

    `opens` tells whether insertion points may be found inside the module.
    """

    layout: Layout | None
    reason: str = ""
    tensor: Tensor | None = None
    opens: bool = False


class Places:
    """The outputs of a network's modules for one image, in the order in which the modules finished.

    Args:
        model: the network. A copy is measured, so that the network itself, its caches and its buffers do not change.
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
        except (RuntimeError, TypeError) as error:  # e.g. the model holds a tensor with a graph
            raise UsageError(
                f"this {self.kind} cannot be copied for measuring ({_first_line(error)}); "
                "model.train() drops the tensors that some networks cache"
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
                f"this {self.kind} does not run on an image of {size} ({_first_line(error)}); "
                "pass one that it accepts: image= a tensor (C, H, W)"
            ) from error

    def layout(self, name: str) -> Layout:
        """Return the layout of a module's output.

        Raises:
            UsageError: nothing can be inserted after the module.
        """
        measured = self._outputs.get(name)
        if measured is None:
            raise UsageError(f"{name} of this {self.kind} is not called as a module, so nothing can be put after it")
        if measured.layout is None:
            raise UsageError(f"nothing can be put after {name} of this {self.kind}: it {measured.reason}")
        return measured.layout

    def output(self, name: str) -> Tensor:
        """Return a module's output for the two images, detached; `layout` describes this tensor."""
        output = self._outputs[name].tensor
        assert output is not None
        return output.detach()

    def holder(self, name: str) -> tuple[str, str]:
        """Return the module that holds a mechanism inserted after `name`, and the module to hook.

        A Sequential would run an added child as one of its items, so its last item becomes the holder. If possible,
        the hook is on this item too, since some networks call the items one by one when they recompute activations.
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
        """Find the ends of the stages: the last module with blocks in it before each change of the resolution.

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

        An item is replaced by the items inside it that have the same output shape. Of nested items that remain, the
        outermost is a block.
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
        """Find the ends of the residual branches: the module that returned the deeper of two maps that are added."""
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
                    "A * stands for one part of a name; 'stages', 'blocks' and 'branches' find places by themselves."
                )
            for name in names:
                self.layout(name)
            matched.update(names)
        return [name for name in self._outputs if name in matched]

    # Machinery ------------------------------------------------------------------------------------------------------

    def _note_as(self, name: str) -> Callable[[nn.Module, object, object], object]:
        def note(module: nn.Module, args: object, output: object) -> object:
            if name in self._outputs:
                self._outputs[name] = _Output(None, "runs more than once for an image")
                return output
            if type(output) is tuple:
                # return views: the module itself did not use them, so their gradient shows whether others use them
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
                    continue  # an input that is passed through
                layout = _layout(tensor, self.images_BCHW, item)
                if layout:
                    return _Output(layout, tensor=tensor)
            return _Output(None, "gives a tuple without a map in it")
        if not isinstance(output, Tensor):
            return _Output(None, f"gives a {type(output).__name__}; name a module inside it")
        layout = _layout(output, self.images_BCHW)
        if layout:
            return _Output(layout, tensor=output)
        reason = f"gives a tensor {tuple(output.shape)} for two images, which is no map of them"
        return _Output(None, reason, opens=True)

    def _reaching(self, names: list[str]) -> list[str]:
        """Drop modules that do not affect the output, such as those after the last attention to the class token."""
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
        """Find the modules that run one after the other, down to modules inside which the resolution is constant."""
        module = self.modules[name] if name else self._model
        children = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
        children = [child for child in children if child in self.modules]
        alone = sum(self._layers(child) > 0 for child in children) == 1
        trunk = []
        for child in children:
            measured = self._outputs.get(child)
            if measured is not None and measured.layout is None and not measured.opens:
                continue  # a list of maps, or a module that runs several times
            inner = self._trunk(child)
            if isinstance(self.modules[child], _CONTAINERS):
                opens = len(set(map(self._grid, inner))) > 1
            else:  # a block may change the resolution inside; a wrapper contains several blocks
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
        """Return whether a module is or holds a module of several layers, other than a Sequential of single layers."""
        inside = [self.modules[other] for other in self.modules if other == name or _inside(other, name)]
        return any(not isinstance(m, _CONTAINERS) and _count_layers(m, self._skipped) > 1 for m in inside)

    def _layers(self, name: str) -> int:
        """Count the layers with weights in a module."""
        return _count_layers(self.modules[name], self._skipped)


class _Flow(TorchFunctionMode):
    """Count the operations between the image and every tensor, and note additions of a deeper map to a shallower one.

    Attributes:
        branches: for each such addition, the modules that returned the deeper map, innermost first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.branches: list[list[str]] = []
        self._depth: dict[int, int] = {}
        self._makers: dict[int, list[str]] = {}
        self._kept: list[Tensor] = []  # keeps the tensors alive, so that no id is used twice

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
        """Note which tensors a module returned."""
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
                self._makers.pop(id(tensor), None)  # changed in place: no longer the module's output
        return output

    def _set(self, tensor: Tensor, depth: int) -> None:
        self._depth[id(tensor)] = depth
        self._kept.append(tensor)


def _layout(output: Tensor, images_BCHW: Tensor, item: int | None = None) -> Layout | None:
    """Find the layout under which the outputs for the two images differ most where the images differ."""
    if len(output) != len(images_BCHW) if output.ndim else True:
        return None
    height, width = images_BCHW.shape[2:]
    candidates = []
    if output.ndim == 4:
        for axis, (rows, columns) in ((1, output.shape[2:]), (-1, output.shape[1:3])):
            if abs(rows * width - columns * height) <= max(height, width):  # the image's aspect ratio, within a cell
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
    # a map is identified by its shape alone; tokens are not, since they can have any order
    return candidates[0] if candidates and output.ndim == 4 else None


@torch.no_grad()
def _agreement(layout: Layout, output: Tensor) -> float:
    """Return how much of the outputs' difference lies where the images differ; 1 if no other cells differ more.

    With random weights it is at least .82, and mostly 1, after the blocks of 19 families of timm with tokens in row
    order. In Hiera, which orders its tokens differently, it is .03 and .06 after the first two stages.
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
    """Replace weights that are all zero by noise: a branch or head that starts at zero would hide differences."""
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
