"""Positions: where in the image each token, window and feature comes from, followed through the model's operations.

Windows, shifts, pooled keys and class tokens differ between families of models, but all are made of a few operations
that move elements. So one image runs through the model together with its *shadow*: a complex tensor that holds the
position y + ix of every pixel, with y and x in [0, 1].

- Operations that move elements (view, permute, roll, window partition …) move the shadow in the same way.
- Operations that mix channels (linear layers, norms) keep the shadow.
- Pooling and strides average the shadow.
- New elements (class tokens, padding) have no position, NaN.
- Operations that pick tokens by their values (topk, argsort or a comparison, then gather or indexing) also pick from
  the shadow. The result is valid only for that image.
- Operations that add tokens to target tokens (scatter) keep the positions of the targets, and record which token was
  added to which target.

If the weights of a softmax run over different positions, the softmax is attention. The shadows of its queries and keys
are their positions. The survey (`survey.py`) runs once for each model and image size, on one image; if tokens are
picked, the survey runs on each image.

Shapes: any. A shadow is complex64 and has the shape of its tensor. Attention logits have two shadows: the positions of
the queries (rows) and of the keys (columns).
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.capture.hooks import Args, Func, Kwargs
from visionattn.errors import warn

NOWHERE = complex(float("nan"), float("nan"))

_Read: TypeAlias = Callable[[object], "Tensor | None"]

_MOVES = {
    *("view", "reshape", "permute", "transpose", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "roll"),
    *("__getitem__", "split", "chunk", "unbind", "tensor_split", "expand", "repeat", "swapaxes", "swapdims", "movedim"),
    *(
        "moveaxis",
        "narrow",
        "select",
        "index_select",
        "flip",
        "clone",
        "view_as",
        "expand_as",
        "t",
        "repeat_interleave",
    ),
    *("T.__get__", "mT.__get__", "ravel", "broadcast_to", "tile", "rot90", "split_with_sizes", "adjoint", "reshape_as"),
    *("pixel_shuffle", "pixel_unshuffle", "unfold", "take_along_dim", "gather", "hsplit", "vsplit", "unflatten"),
}
_JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}
_PICKS = {"__getitem__", "gather", "index_select", "take_along_dim"}
_ADDS = {"scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "index_add", "index_add_"}
_SORTS = {"sort", "topk", "msort", "kthvalue"}
_PRODUCTS = {"matmul", "__matmul__", "bmm", "__rmatmul__"}
_POOLS = {
    *("conv2d", "avg_pool2d", "max_pool2d", "_max_pool2d", "adaptive_avg_pool2d", "interpolate", "conv_transpose2d"),
    *("adaptive_max_pool2d", "upsample", "lp_pool2d"),
}


def image_positions(images_BCHW: Tensor) -> Tensor:
    """Return the position of every pixel, y + ix with both in [0, 1], in the shape of the images."""
    height, width = images_BCHW.shape[-2:]
    y_H1 = (torch.arange(height, device=images_BCHW.device)[:, None] + 0.5) / height
    x_1W = (torch.arange(width, device=images_BCHW.device)[None] + 0.5) / width
    return torch.complex(*torch.broadcast_tensors(y_H1, x_1W)).expand(images_BCHW.shape)


def shadow(value: object) -> Tensor | None:
    """Return the positions of a tensor's elements; None if they are not known."""
    return getattr(value, "_positions", None) if isinstance(value, Tensor) else None


def columns(value: object) -> Tensor | None:
    """Return the positions of the keys of attention logits; None if they are not known."""
    return getattr(value, "_columns", None) if isinstance(value, Tensor) else None


def cast(value: Tensor, positions: Tensor | None, key_positions: Tensor | None = None) -> None:
    """Attach shadows to a tensor. A shadow of another shape is dropped, and so are shadows of integers and booleans."""
    for attribute, cast_shadow in (("_positions", positions), ("_columns", key_positions)):
        if cast_shadow is not None and cast_shadow.shape == value.shape and value.is_floating_point():
            setattr(value, attribute, cast_shadow)
        elif hasattr(value, attribute):
            delattr(value, attribute)


def depend(args: Args, kwargs: Kwargs, out: object) -> None:
    """Mark a function's results as dependent on the image's content, if one of its inputs depends on the image."""
    if any(hasattr(value, "_depends") or shadow(value) is not None for value in _tensors((args, kwargs))):
        for value in _tensors(out):
            setattr(value, "_depends", True)  # noqa: B010 - mypy knows no such attribute of a tensor


def picked(func: Func, args: Args, kwargs: Kwargs) -> tuple[Tensor, bool] | None:
    """Return the positions among which a function picks elements, and whether the choice depends on the image.

    Return None for functions that do not pick.
    """
    if _name(func) not in _PICKS:
        return None
    source, *others = _tensors((args, kwargs))
    by = [value for value in others if not value.is_floating_point()]
    if not by or (positions := shadow(source)) is None or not _vary(positions):
        return None
    return positions, any(hasattr(value, "_depends") for value in by)


def merged(func: Func, args: Args, kwargs: Kwargs) -> tuple[Tensor, Tensor] | None:
    """Return the positions of the tokens that a function adds to target tokens, and the positions of the targets.

    The two tensors have one entry for each pair of token and target. The result is None for functions that do not add
    tokens.
    """
    name = _name(func)
    if name not in _ADDS:
        return None
    arguments = dict(zip(("input", "dim", "index", "source"), args, strict=False)) | kwargs
    target, index = arguments["input"], arguments["index"]
    into, moved = shadow(target), shadow(arguments.get("src", arguments.get("source")))
    if into is None or moved is None or not _vary(into):
        return None
    dim = arguments["dim"] % into.ndim
    if name.startswith("index_add"):
        into = into.index_select(dim, index)
    else:
        into, moved = into.gather(dim, index), moved[tuple(map(slice, index.shape))]
    known = ~(moved.isnan() | into.isnan())
    pairs = torch.cat([torch.view_as_real(part[known]) for part in (moved, into)], 1).unique(dim=0)
    return torch.view_as_complex(pairs[:, :2].contiguous()), torch.view_as_complex(pairs[:, 2:].contiguous())


def follow(func: Func, args: Args, kwargs: Kwargs, out: object) -> None:
    """Attach a shadow to `out = func(*args, **kwargs)`, computed from the shadows of the arguments."""
    name = _name(func)
    sources = [value for value in _tensors((args, kwargs)) if shadow(value) is not None or columns(value) is not None]
    if not sources:
        return
    if name in _MOVES or name in _JOINS or name == "pad":
        for read in (shadow, columns):
            _replay(func, name, args, kwargs, out, read)
        return
    if not isinstance(out, Tensor):
        for part in () if name in _SORTS else _tensors(out):  # sorting moves elements to unknown places
            _inherit(part, sources)
        return
    if name in _PRODUCTS or name in ("baddbmm", "addmm", "einsum"):
        _multiply(name, args, out)
        if shadow(out) is not None or columns(out) is not None:
            return
    if name in _POOLS and out.ndim == 4 and (source := shadow(sources[0])) is not None and source.ndim == 4:
        keys = columns(sources[0]) if source.shape[-2:] == out.shape[-2:] else None
        # a convolution over the heads of attention logits (B, heads, Q, K) also keeps the positions of the keys
        cast(out, _pool(source, out), None if keys is None else _pool(keys, out))
    elif name in ("mean", "sum", "amax", "amin", "max", "logsumexp", "softmax_sum"):
        _reduce(out, sources[0], args, kwargs)
    elif name in ("linear", "bilinear") and (source := shadow(sources[0])) is not None:
        cast(out, _nanmean(source, -1).expand(out.shape))
        if (key_positions := columns(sources[0])) is not None:
            cast(out, shadow(out), _nanmean(key_positions, -1).expand(out.shape))
    elif name in ("conv1d",) and (source := shadow(sources[0])) is not None and source.shape[-1] == out.shape[-1]:
        cast(out, _nanmean(source, 1).expand(out.shape))
    else:
        _inherit(out, sources)


def follow_module(args: Args, kwargs: Kwargs, out: object) -> None:
    """If a module's output has no shadow, attach the shadow of an input from which it can inherit; see `_inherit`."""
    sources = [value for value in _tensors((args, kwargs)) if shadow(value) is not None]
    for value in _tensors(out):
        if shadow(value) is None and columns(value) is None:
            _inherit(value, sources)


def attend(query: Tensor, key: Tensor, out: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the positions of the queries (..., Q) and the keys (..., K) of a fused call.

    The output of the call gets the positions of the queries.
    """
    rows, keys = (None if (p := shadow(value)) is None else _along(p, -1) for value in (query, key))
    if rows is not None:
        cast(out, rows.expand(out.shape))
    return None if rows is None else rows.squeeze(-1), None if keys is None else keys.squeeze(-1)


def per_token(value: object) -> Tensor | None:
    """Return the positions (B, N) of tokens (N, B, C), the shape of the inputs of multi-head attention."""
    positions = shadow(value)
    return None if positions is None or positions.ndim != 3 else _along(positions, -1).squeeze(-1).transpose(0, 1)


def _name(func: Func) -> str:
    """Return the name of a function of torch, or `mT.__get__` for an attribute such as `x.mT`."""
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        name = f"{getattr(getattr(func, '__self__', None), '__name__', '')}.__get__"
    return name.removeprefix("boolean_dispatch.<locals>.")


def _tensors(values: object) -> Iterable[Tensor]:
    """Iterate over all tensors in nested dicts, tuples and lists."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _replay(func: Func, name: str, args: Args, kwargs: Kwargs, out: object, read: _Read) -> None:
    """Apply a function that moves elements to the shadows of its arguments, and attach the results to `out`."""
    if not any(read(value) is not None for value in _tensors((args, kwargs))):
        return

    def swap(value: Any) -> Any:  # arguments of any function of torch
        if isinstance(value, Tensor):
            positions = read(value)
            if positions is not None:
                return positions
            is_data = value.is_floating_point() or name in _JOINS
            return torch.full(value.shape, NOWHERE, device=value.device) if is_data else value
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            return type(value)(map(swap, value))
        return value

    moved_args, moved_kwargs = swap(args), {key: swap(value) for key, value in kwargs.items()}
    try:
        if name == "pad":
            moved = F.pad(moved_args[0], args[1] if len(args) > 1 else kwargs["pad"], value=float("nan"))
        elif name == "unfold" and moved_args[0].ndim == 4 and len(args) < 4:  # F.unfold, not Tensor.unfold
            parts = (moved_args[0].real, moved_args[0].imag)
            moved = torch.complex(*(func(part, *moved_args[1:], **moved_kwargs) for part in parts))
        else:
            moved = func(*moved_args, **moved_kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        # some functions of torch have no complex form; the model itself ran, so warn instead of raising
        reason = str(error).partition("\n")[0]
        warn(f"positions could not be followed through {name} ({reason}); attention after it may be unlabelled")
        return
    for value, positions in zip(_tensors(out), _tensors(moved), strict=False):
        if read is shadow:
            cast(value, positions, columns(value))
        else:
            cast(value, shadow(value), positions)


def _inherit(out: Tensor, sources: list[Tensor]) -> None:
    """Copy a shadow from the first input with the output's shape, or else from the first input that broadcasts to it.

    This is the rule for elementwise operations, norms and activations.
    """
    rows = next((shadow(s) for s in sources if shadow(s) is not None and s.shape == out.shape), None)
    keys = next((columns(s) for s in sources if columns(s) is not None and s.shape == out.shape), None)
    if rows is None and keys is None:
        for source in sources:
            if (positions := shadow(source)) is not None and source.ndim <= out.ndim and _broadcasts(source, out):
                rows = positions.expand(out.shape)
                break
    if rows is not None or keys is not None:
        cast(out, rows, keys)


def _broadcasts(source: Tensor, out: Tensor) -> bool:
    pairs = zip(reversed(source.shape), reversed(out.shape), strict=False)
    return source.numel() > 1 and all(s in (1, o) for s, o in pairs)


def _multiply(name: str, args: Args, out: Tensor) -> None:
    """Attach shadows to a @ b: positions of rows from a, and positions of columns from b.

    A result that has both is treated as attention logits.
    """
    if name == "einsum":
        _einsum(args, out)
        return
    left, right = args[1:3] if name in ("baddbmm", "addmm") else args[:2]
    if name == "__rmatmul__":
        left, right = right, left
    rows, keys = shadow(left), shadow(right)
    if rows is None or keys is None:  # a projection of patches: take the mean position of each patch
        row_positions = None if rows is None else _spread(_nanmean(rows, -1), out)
    else:
        row_positions = _spread(_along(rows, -1), out)
    if columns(left) is not None:  # weights @ values: the result has the positions of the queries
        cast(out, row_positions)
        return
    key_positions = None if keys is None else _spread(_along(keys, -2), out)
    if (
        key_positions is not None
        and key_positions.isnan().all()
        and not (row_positions is None or row_positions.isnan().all())
    ):
        key_positions = None  # only rows have positions, so the result holds features instead of attention logits
    cast(out, row_positions, key_positions)


def _einsum(args: Args, out: Tensor) -> None:
    if not isinstance(args[0], str) or "..." in args[0] or "->" not in args[0]:
        return
    operands = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
    inputs, result = args[0].replace(" ", "").split("->")
    shadows: list[Tensor | None] = []
    for letters, value in zip(inputs.split(","), operands, strict=False):
        if (positions := shadow(value)) is None:
            shadows.append(None)
            continue
        for axis in reversed([i for i, letter in enumerate(letters) if letter not in result]):
            positions = _nanmean(positions, axis).squeeze(axis)
        remaining = [letter for letter in letters if letter in result]
        positions = positions.permute([remaining.index(letter) for letter in result if letter in remaining])
        for axis, letter in enumerate(result):
            if letter not in remaining:
                positions = positions.unsqueeze(axis)
        shadows.append(positions.expand(out.shape))
    if len(shadows) == 2:
        is_weights = columns(operands[0]) is not None
        cast(out, shadows[0], None if is_weights else shadows[1])


def _reduce(out: Tensor, source: Tensor, args: Args, kwargs: Kwargs) -> None:
    """Attach a shadow to a mean, sum or maximum: the mean position of its inputs, or NaN if these are all positions."""
    positions = shadow(source)
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if positions is None or dims is None or isinstance(dims, Tensor):
        return
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    low_high = [torch.view_as_real(positions).nan_to_num(bad) for bad in (9.0, -9.0)]
    axes = [d % positions.ndim for d in dims]
    spread = low_high[1].amax(axes, keepdim=True) - low_high[0].amin(axes, keepdim=True)
    mean = positions
    for axis in axes:
        mean = _nanmean(mean, axis)
    if (spread > 1e-4).any() and not _vary(mean):  # the mean runs over all positions
        mean = torch.full_like(mean, NOWHERE)
    if out.ndim < mean.ndim:
        for axis in sorted(axes, reverse=True):
            mean = mean.squeeze(axis)
    cast(out, mean)


def _pool(positions: Tensor, out: Tensor) -> Tensor | None:
    height, width = out.shape[-2:]
    if height * width == 1 and positions.shape[-2] * positions.shape[-1] > 1 and positions.shape[-1] != 1:
        pooled = torch.full((*positions.shape[:2], 1, 1), NOWHERE, device=positions.device)
    elif (height, width) == tuple(positions.shape[-2:]):
        pooled = positions
    else:
        plane = _nanmean(positions, 1)
        known = ~plane.isnan()
        parts = (plane.real.nan_to_num(0), plane.imag.nan_to_num(0), known.float())
        y, x, share = (F.adaptive_avg_pool2d(part.contiguous(), (height, width)) for part in parts)
        pooled = torch.where(share > 0, torch.complex(y, x) / share, NOWHERE)
    if pooled.shape[:2] == out.shape[:2]:
        return pooled
    if len(pooled) != len(out):
        return None
    return _nanmean(pooled, 1).expand(out.shape)


def _nanmean(positions: Tensor, dim: int) -> Tensor:
    if positions.stride(dim) == 0 or positions.shape[dim] == 1:  # an expanded axis: all elements are equal
        return positions.narrow(dim, 0, 1) if positions.shape[dim] else positions
    known = ~positions.isnan()
    total = torch.where(known, positions, 0).sum(dim, keepdim=True)
    count = known.sum(dim, keepdim=True)
    return torch.where(count > 0, total / count, NOWHERE)


def _along(positions: Tensor, dim: int) -> Tensor:
    """Reduce `dim` to size 1. Equal positions stay; different positions give NaN, since a sum over `dim` mixes them."""
    if positions.stride(dim) == 0 or positions.shape[dim] == 1:
        return positions.narrow(dim, 0, 1)
    parts = torch.view_as_real(positions)
    axis = dim % positions.ndim
    span = parts.nan_to_num(-9.0).amax(axis, keepdim=True) - parts.nan_to_num(9.0).amin(axis, keepdim=True)
    return torch.where((span > 1e-4).any(-1), NOWHERE, _nanmean(positions, dim))


def _vary(positions: Tensor) -> bool:
    """Return whether the positions are not all equal."""
    parts = torch.view_as_real(positions).flatten(0, -2)
    return bool((parts.nan_to_num(-9.0).amax(0) - parts.nan_to_num(9.0).amin(0) > 1e-4).any())


def _spread(positions: Tensor, out: Tensor) -> Tensor | None:
    try:
        return positions.expand(out.shape)
    except RuntimeError:
        return None
