"""Where a mechanism can be put into a network: the modules that give feature maps or tokens, and those among them that
end a stage, a block or a residual branch.

All of it is measured, without a table of networks: two images that differ in one rectangle run through the network
once. Of the layouts that a shape allows that one is taken under which the outputs differ at this rectangle; tokens that
differ elsewhere have an order of their own, and are refused.

Shapes: B batch, C channels, H rows and W columns of the image, h rows and w columns of the grid, N tokens.
"""

import contextlib
import copy
import fnmatch
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from visionattn.data.placement import image_shape
from visionattn.errors import UsageError, nearest

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)
_ADDITIONS = frozenset(["add", "add_", "__add__", "__radd__", "__iadd__"])
_MAX_PREFIX = 16  # class and register tokens; the networks of timm have fewer
_ROWS, _COLUMNS = (0.25, 0.375), (0.625, 0.75)  # where the images differ: nowhere near its own mirror images


@dataclass(frozen=True)
class Layout:
    """How a module's output holds a map.

    Attributes:
        channels: C.
        grid: (h, w) for images of the size that was measured.
        channel_axis: 1 for (B, C, h, w), −1 for (B, h, w, C) and tokens (B, N, C).
        num_prefix_tokens: tokens before those of the grid; None where the output is no tokens.
        item: which item of a tuple it is; None where the output is the tensor itself.
    """

    channels: int
    grid: tuple[int, int]
    channel_axis: int
    num_prefix_tokens: int | None = None
    item: int | None = None

    def to_maps(self, x: Tensor) -> Tensor:
        """Bring the output, without its prefix tokens, to (B, C, h, w)."""
        if self.num_prefix_tokens is not None:
            grid_BNC = x[:, self.num_prefix_tokens :]
            return grid_BNC.transpose(1, 2).unflatten(2, self._grid_of(grid_BNC.shape[1]))
        return x if self.channel_axis == 1 else x.permute(0, 3, 1, 2)

    def from_maps(self, maps_BChw: Tensor, x: Tensor) -> Tensor:
        """Bring (B, C, h, w) to the form of the output `x`, whose prefix tokens stay."""
        if self.num_prefix_tokens is not None:
            grid_BNC = maps_BChw.flatten(2).transpose(1, 2)
            prefix = self.num_prefix_tokens
            return torch.cat([x[:, :prefix], grid_BNC], 1) if prefix else grid_BNC
        return maps_BChw if self.channel_axis == 1 else maps_BChw.permute(0, 2, 3, 1)

    def _grid_of(self, count: int) -> tuple[int, int]:
        """The grid of larger or smaller images of the same shape."""
        height, width = self.grid
        if count == height * width:
            return self.grid
        scale = (count / (height * width)) ** 0.5
        height, width = round(height * scale), round(width * scale)
        if height * width != count:
            raise UsageError(
                f"{count} tokens are no grid in the shape of {self.grid[0]}×{self.grid[1]}, for which attention was "
                "inserted; insert it with image= an example of the size that you use"
            )
        return height, width


@dataclass
class _Seen:
    """What one module gave: its layout and the tensor, or why nothing can be put after it, and whether there may be
    places inside it."""

    layout: Layout | None
    reason: str = ""
    output: Tensor | None = None
    opens: bool = False


class Places:
    """What each module of a network gave for one image, in the order in which they ended.

    Args:
        model: the network. A copy of it is measured, so that it stays as it is: its caches and buffers too.
        image: (C, H, W) or (1, C, H, W), an example of its input; None for one of the size it was configured for.
        skip: modules of this class, and what is inside them, are passed over.

    Raises:
        UsageError: the network cannot be copied, or does not run on the image.
    """

    def __init__(self, model: nn.Module, image: Tensor | None = None, *, skip: type[nn.Module]) -> None:
        self.kind = type(model).__name__
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        self.images_BCHW = _two_images(image_shape(model) if image is None else image.shape[-3:]).to(like)
        self.image_size = (self.images_BCHW.shape[2], self.images_BCHW.shape[3])
        try:
            self._model = copy.deepcopy(model).eval()
        except (RuntimeError, TypeError) as error:  # it holds a tensor with a graph, or something else
            raise UsageError(
                f"this {self.kind} cannot be copied, so that it could be measured ({_first_line(error)}); "
                "model.train() drops what some networks keep from their last run"
            ) from error
        _stir(self._model)
        self._skipped = {part for outer in self._model.modules() if isinstance(outer, skip) for part in outer.modules()}
        named = self._model.named_modules()
        self.modules = {name: module for name, module in named if name and module not in self._skipped}
        self._seen: dict[str, _Seen] = {}
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
                "give one that it takes: image= a tensor (C, H, W)"
            ) from error

    def layout(self, name: str) -> Layout:
        """The layout of what a module gives.

        Raises:
            UsageError: nothing can be put after it.
        """
        seen = self._seen.get(name)
        if seen is None:
            raise UsageError(f"{name} of this {self.kind} is not run as a module, so nothing can be put after it")
        if seen.layout is None:
            raise UsageError(f"nothing can be put after {name} of this {self.kind}: it {seen.reason}")
        return seen.layout

    def output(self, name: str) -> Tensor:
        """What a module gave for the two images, detached: the tensor that `layout` is of."""
        output = self._seen[name].output
        assert output is not None
        return output.detach()

    def holder(self, name: str) -> tuple[str, str]:
        """The module to keep what is put after `name`, and the module to hook.

        A Sequential would run what it keeps as one of its items, so its last item keeps it. That one is hooked too, for
        some networks call the items themselves where they recompute activations.
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
        """The ends of the stages: the last module with blocks in it before the resolution changes.

        A network of one resolution, as a plain ViT, has four stages of equally many blocks (as Li et al. 2022,
        2203.16527, section 3, divide it).
        """
        trunk, blocks = self._trunk(""), self._blocks()
        holding = [name for name in trunk if any(block == name or _inside(block, name) for block in blocks)]
        holding = holding or [name for name in trunk if self._has_blocks(name)]
        if not blocks:  # then stages are of single layers, as VGG's
            holding = holding or trunk
        runs = [list(run) for _, run in itertools.groupby(holding, key=self._grid)]
        runs = [run for run in runs if any(map(self._layers, run))]
        if len(runs) > 1:
            return self._reaching([run[-1] for run in runs])
        blocks = blocks or holding
        count = min(4, len(blocks))
        return self._reaching([blocks[len(blocks) * (part + 1) // count - 1] for part in range(count)])

    def blocks(self) -> list[str]:
        """The items of Sequentials and ModuleLists that have at least two layers with weights: the innermost, unless
        what is inside has another shape."""
        return self._reaching(self._blocks())

    def _blocks(self) -> list[str]:
        items = [
            name for name in self._found() if isinstance(self._parent(name), _CONTAINERS) and self._layers(name) > 1
        ]
        blocks = [
            name
            for name in items
            if not any(_inside(other, name) and self._shape(other) == self._shape(name) for other in items)
        ]
        return [name for name in blocks if not any(_inside(name, other) for other in blocks)]

    def branches(self) -> list[str]:
        """The ends of the residual branches: the module that gave the deeper of two maps that are added."""
        found = []
        for names in self._flow.branches:
            weighted = [name for name in names if next(self.modules[name].parameters(), None) is not None]
            found += [name for name in (weighted[-1:] or names[:1]) if self._has_layout(name)]
        return self._reaching(list(dict.fromkeys(found)))

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """The modules whose names match; `*` stands for one part of a dotted name, or for a part of it.

        Raises:
            UsageError: a pattern matches nothing, or a module that nothing can be put after.
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
        return [name for name in self._seen if name in matched]

    # Machinery ------------------------------------------------------------------------------------------------------

    def _note_as(self, name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> Any:
            if name in self._seen:
                self._seen[name] = _Seen(None, "runs more than once for an image")
                return output
            if type(output) is tuple:
                # under another identity, which the module itself has not used: does anyone outside use it?
                given = {id(tensor): tensor for tensor in _tensors(output) if not _holds(args, tensor)}
                views = {key: tensor.view_as(tensor) for key, tensor in given.items()}
                output = tuple(views.get(id(item), item) for item in output)
            self._seen[name] = self._look_at(output, args)
            self._flow.made(name, output)
            return output

        return note

    def _look_at(self, output: Any, inputs: Any) -> _Seen:
        if type(output) is tuple:
            for item, tensor in enumerate(output):
                if not isinstance(tensor, Tensor) or _holds(inputs, tensor):
                    continue  # handed through
                layout = _layout(tensor, self.images_BCHW, item)
                if layout:
                    return _Seen(layout, output=tensor)
            return _Seen(None, "gives a tuple without a map in it")
        if not isinstance(output, Tensor):
            return _Seen(None, f"gives a {type(output).__name__}; name a module inside it")
        layout = _layout(output, self.images_BCHW)
        if layout:
            return _Seen(layout, output=output)
        return _Seen(None, f"gives a tensor {tuple(output.shape)} for two images, which is no map of them", opens=True)

    def _reaching(self, names: list[str]) -> list[str]:
        """Leave out places that do not matter for the output, as behind the last block of a ViT whose class token alone
        is read."""
        outputs = {name: output for name in names if (output := self._seen[name].output) is not None}
        known = [name for name, output in outputs.items() if output.requires_grad]
        with torch.inference_mode(False), torch.enable_grad():
            totals = [tensor.float().square().sum() for tensor in _tensors(self._output) if tensor.requires_grad]
            if not totals or not known:
                return names
            wanted = [outputs[name] for name in known]
            gradients = torch.autograd.grad(totals, wanted, retain_graph=True, allow_unused=True)
        dead = {
            name
            for name, gradient in zip(known, gradients, strict=True)
            if gradient is None or not self.layout(name).to_maps(gradient).any()
        }
        return names if len(dead) == len(names) else [name for name in names if name not in dead]

    def _trunk(self, name: str) -> list[str]:
        """The modules that run one after the other, down to where the resolution no longer changes inside of one."""
        module = self.modules[name] if name else self._model
        children = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
        children = [child for child in children if child in self.modules]
        alone = sum(self._layers(child) > 0 for child in children) == 1
        found = []
        for child in children:
            seen = self._seen.get(child)
            if seen is not None and seen.layout is None and not seen.opens:
                continue  # lists of maps, and modules that run several times
            inner = self._trunk(child)
            if isinstance(self.modules[child], _CONTAINERS):
                opens = len(set(map(self._grid, inner))) > 1
            else:  # a block may change the resolution inside; a mere frame has several blocks that do
                opens = alone and len({self._grid(part) for part in inner if self._has_blocks(part)}) > 1
            found += [child] if self._has_layout(child) and not opens else inner
        order = {part: place for place, part in enumerate(self._seen)}
        return sorted(found, key=lambda part: order[part])

    def _found(self) -> list[str]:
        return [name for name in self._seen if self._has_layout(name)]

    def _has_layout(self, name: str) -> bool:
        return name in self._seen and self._seen[name].layout is not None

    def _grid(self, name: str) -> tuple[int, int]:
        return self.layout(name).grid

    def _shape(self, name: str) -> tuple[int, tuple[int, int]]:
        return self.layout(name).channels, self.layout(name).grid

    def _parent(self, name: str) -> nn.Module:
        parent = name.rpartition(".")[0]
        return self.modules[parent] if parent else self._model

    def _has_blocks(self, name: str) -> bool:
        """Whether there is a module of several layers in it, or it is one; a Sequential of single layers, as a stem, is
        none."""
        inside = [self.modules[other] for other in self.modules if other == name or _inside(other, name)]
        return any(not isinstance(m, _CONTAINERS) and _count_layers(m, self._skipped) > 1 for m in inside)

    def _layers(self, name: str) -> int:
        """Layers with weights in a module."""
        return _count_layers(self.modules[name], self._skipped)


class _Flow(TorchFunctionMode):
    """Counts the operations between the image and every tensor, and notes where a deeper map is added to a shallower.

    Attributes:
        branches: for each such addition, the modules that gave the deeper map, innermost first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.branches: list[list[str]] = []
        self._depth: dict[int, int] = {}
        self._makers: dict[int, list[str]] = {}
        self._kept: list[Tensor] = []  # so that no id is given twice

    @contextlib.contextmanager
    def of(self, image: Tensor) -> Iterator[None]:
        self._set(image, 0)
        with self:
            yield
        self._kept.clear()
        self._depth.clear()
        self._makers.clear()

    def made(self, name: str, output: Any) -> None:
        for tensor in _tensors(output):
            self._makers.setdefault(id(tensor), []).append(name)
            self._kept.append(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
                self._makers.pop(id(tensor), None)  # added in place: no longer what the module gave
        return output

    def _set(self, tensor: Tensor, depth: int) -> None:
        self._depth[id(tensor)] = depth
        self._kept.append(tensor)


def _layout(output: Tensor, images_BCHW: Tensor, item: int | None = None) -> Layout | None:
    """Find the layout under which the two images' outputs differ most where the images do."""
    if len(output) != len(images_BCHW) if output.ndim else True:
        return None
    height, width = images_BCHW.shape[2:]
    candidates = []
    if output.ndim == 4:
        for axis, (rows, columns) in ((1, output.shape[2:]), (-1, output.shape[1:3])):
            if abs(rows * width - columns * height) <= max(height, width):  # the image's shape, give or take a cell
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
    # tokens may be in any order; the shape of a map is proof enough
    return candidates[0] if candidates and output.ndim == 4 else None


@torch.no_grad()
def _agreement(layout: Layout, output: Tensor) -> float:
    """How much the outputs differ where the images do: 1 where no other cells, as many, differ more.

    Measured on random weights, after the blocks of 19 families of timm whose tokens lie in rows: at least .82, mostly
    1. Hiera, whose tokens have an order of their own: .03 and .06 after its first two stages.
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
def _stir(model: nn.Module) -> None:
    """Put noise in place of weights that are zero: a branch or head that starts at zero would tell nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def _count_layers(module: nn.Module, skipped: set[nn.Module]) -> int:
    return sum(isinstance(part, _WEIGHTED) and part not in skipped for part in module.modules())


def _two_images(shape: Sequence[int]) -> Tensor:
    """Noise, and the same noise with another rectangle."""
    generator = torch.Generator().manual_seed(0)
    first, other = torch.randn(2, *shape, generator=generator)
    rows, columns = (
        slice(int(low * count), max(int(low * count) + 1, int(high * count)))
        for (low, high), count in zip((_ROWS, _COLUMNS), shape[1:], strict=True)
    )
    second = first.clone()
    second[:, rows, columns] = other[:, rows, columns]
    return torch.stack([first, second])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _holds(value: Any, tensor: Tensor) -> bool:
    return any(part is tensor for part in _tensors(value))


def _matches(name: list[str], pattern: list[str]) -> bool:
    return len(name) == len(pattern) and all(map(fnmatch.fnmatchcase, name, pattern))


def _inside(name: str, other: str) -> bool:
    return name.startswith(f"{other}.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
