"""Surveys: which calls in a model are attention, and where their queries and keys lie in the image.

A survey runs one image through the model together with the positions of its pixels (`token_positions.py`). The survey
is cached as long as the model exists. If the model selects tokens depending on the image, every image of every call is
surveyed. During a survey the model is in evaluation mode and computes no gradients; afterwards its training flags and
the random state are restored.

Shapes: B images, W windows, Q queries, K keys, h × w grid.
"""

import contextlib
import copy
import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.attention import Retina, View
from visionattn.capture import token_positions
from visionattn.capture.hooks import Args, Func, Kwargs, Watcher, gate_of, hidden_from_watchers
from visionattn.capture.token_layout import (
    Activation,
    Axes,
    Kind,
    Merge,
    Site,
    Tokens,
    infer_axes,
    infer_layout,
    infer_tokens,
    per_window,
    varies,
)
from visionattn.errors import UsageError


@dataclass(repr=False)
class Survey:
    """The sites of attention, gates, retinas and feature maps of a model.

    `print` and a notebook show one line for each site.

    Attributes:
        sites: (name of the module, site) for every softmax and every fused call, in order. The site is None if the call
            is not understood, or is not attention over positions.
        times: for each entry of `sites`, the number of modules that had returned before the call; comparable with
            `Activation.time`.
        activations: outputs of modules that lie on a grid, in order.
        unlabelled: module → the reason why its softmax or fused call is not understood.
        other: module → the reason why its softmax or fused call is not attention over positions.
        missed: names of modules whose class name suggests attention, but in which no attention was found.
        gates: name of a gate → whether the gate is over positions; otherwise it is over channels.
        glimpses: names of the retinas that read glimpses.
        picks: whether the model selects tokens depending on the image, so that their positions differ between images.
    """

    sites: list[tuple[str, Site | None]] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)
    unlabelled: dict[str, str] = field(default_factory=dict)
    other: dict[str, str] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    gates: dict[str, bool] = field(default_factory=dict)
    glimpses: list[str] = field(default_factory=list)
    picks: bool = False

    @property
    def attention(self) -> list[Site]:
        """The calls of attention over positions, in order."""
        return [site for _, site in self.sites if site is not None]

    @property
    def has_feature_maps(self) -> bool:
        """Whether an activation lies on a grid of more than one cell."""
        return any(activation.tokens.grid != (1, 1) for activation in self.activations)

    def to_dict(self) -> dict[str, object]:
        """Return the survey as plain data for `json.dumps`, without the positions of single tokens."""
        return {
            "attention": [
                {
                    "name": site.name,
                    "kind": site.kind,
                    "grid": list(site.grid),
                    "heads": site.heads,
                    "windows": len(site.keys.index_WN),
                    "num_prefix_tokens": site.num_prefix_tokens,
                    "fused": site.fused,
                }
                for site in self.attention
            ],
            "activations": [{"name": item.name, "grid": list(item.tokens.grid)} for item in self.activations],
            "gates": dict(self.gates),
            "glimpses": list(self.glimpses),
            "unlabelled": dict(self.unlabelled),
            "other": dict(self.other),
            "missed": list(self.missed),
            "picks": self.picks,
        }

    def __repr__(self) -> str:
        lines = [f"Survey({len(self.attention)} calls of attention, {len(self.activations)} outputs on a grid)"]
        for site in self.attention:
            windows = f", {len(site.keys.index_WN)} windows" if site.windowed else ""
            lines.append(f"  {site.name}: {site.kind}, grid {site.grid[0]}×{site.grid[1]}, {site.heads} heads{windows}")
        lines += [
            f"  {name}: gate over {'positions' if spatial else 'channels'}" for name, spatial in self.gates.items()
        ]
        lines += [f"  {name}: glimpses" for name in self.glimpses]
        lines += [f"  {name}: {reason}" for name, reason in (self.unlabelled | self.other).items()]
        lines += [f"  {name}: looks like attention, but did not attend" for name in self.missed]
        if self.picks:
            lines.append("  the model selects its tokens depending on the image")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Show the lines in a notebook."""
        return f"<pre>{html.escape(repr(self))}</pre>"


class StaleSurveyError(UsageError):
    """The model did not run as it did when it was surveyed. `Method` catches this error and surveys the model again."""


class Surveyor(Watcher):
    """A watcher that finds the sites while one image runs through the model."""

    follows = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.survey = Survey()
        self.time = 0
        self.looks_like_attention: dict[str, bool] = {}  # name → whether the module has attended
        self._inside: tuple[Tensor | None, ...] | None = None
        self._layouts: dict[int, tuple[Tensor, tuple[Tokens, int] | None]] = {}
        self._whole: list[Axes] = []  # grids of the tokens before some of them were dropped
        self._attended: list[Axes] = []  # grids of the keys of every call until the first tokens are dropped
        self._merges: list[Merge] = []
        tokens = [part.cls_token for part in model.modules() if hasattr(part, "cls_token")]
        self.class_token = not tokens or any(token is not None for token in tokens)

    def watched(self, module: nn.Module) -> bool:
        return not isinstance(module, nn.Softmax)  # the module around a softmax is the one that attends

    def enter(self, name: str, module: nn.Module) -> None:
        if _looks_like_attention(module):
            self.looks_like_attention.setdefault(name, False)

    def leave(self, name: str, module: nn.Module, args: Args, kwargs: Kwargs, out: object) -> None:
        self.time += 1
        along_row = False
        if isinstance(out, Tensor) and out.ndim == 4 and out.shape[1:3] == (1, 1):
            with torch._C.DisableTorchFunction():
                along_row = varies(token_positions.shadow(out), 3)
        if (gate := gate_of(name, module, out, along_row=along_row)) is not None:
            self.survey.gates[name] = gate[0] == "spatial_gate" and gate[1].shape[2:].numel() > 1
            for outer in self.stack:
                self.looks_like_attention[outer] = True
        with torch._C.DisableTorchFunction():  # these computations belong to the survey, not to the model
            token_positions.follow_module(args, kwargs, out)
            value = out[0] if isinstance(out, (tuple, list)) and out else out
            if isinstance(value, Tensor) and (positions := token_positions.shadow(value)) is not None:
                layout = self._layout(positions)
                if layout is not None:
                    self.survey.activations.append(Activation(name, *layout, self.time))

    def _layout(self, positions: Tensor) -> "tuple[Tokens, int] | None":
        """Return the layout of an output, given the positions of its elements; cached by the tensor `positions`."""
        if id(positions) not in self._layouts:
            self._layouts[id(positions)] = (positions, infer_layout(positions, self._whole, self._merges))
        return self._layouts[id(positions)][1]

    def __torch_function__(self, func: Func, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        out = super().__torch_function__(func, types, args, kwargs)
        token_positions.depend(args, kwargs or {}, out)
        return out

    def other(self, func: Func, args: Args, kwargs: Kwargs) -> object:
        if func is not F.multi_head_attention_forward:
            out = func(*args, **kwargs)
            if (pick := token_positions.picked(func, args, kwargs)) is not None:
                among, by_content = pick
                self.survey.picks |= by_content
                self._whole += [*self._attended, infer_axes(among)]
                self._attended = []
            if (merge := token_positions.merged(func, args, kwargs)) is not None:
                self._merges.append(merge)
            token_positions.follow(func, args, kwargs, out)
            return out
        # positions cannot be followed inside multi_head_attention_forward; `fused` and `softmax` read them here
        self._inside = tuple(
            token_positions.per_token(_argument(args, kwargs, i, n)) for i, n in ((0, "query"), (1, "key"))
        )
        try:
            out = func(*args, **kwargs)
        finally:
            self._inside = None
        if (rows := token_positions.shadow(_argument(args, kwargs, 0, "query"))) is not None:
            token_positions.cast(out[0], rows)
        return out

    def looked(
        self, retina: Retina, look: Callable[[View, Tensor], Tensor], view: View, location_BR2: Tensor
    ) -> Tensor:
        if self.names[retina] not in self.survey.glimpses:
            self.survey.glimpses.append(self.names[retina])
        with torch._C.DisableTorchFunction():  # glimpses differ between images, so their positions are not followed
            return look(view, location_BR2)

    def fused(self, func: Func, args: Args, kwargs: Kwargs) -> Tensor:
        out: Tensor = func(*args, **kwargs)
        query, key = _argument(args, kwargs, 0, "query"), _argument(args, kwargs, 1, "key")
        if self._inside is None:
            rows, keys = token_positions.attend(query, key, out)
        else:
            rows, keys = (_per_head(p, x.shape[:-1]) for p, x in zip(self._inside, (query, key), strict=True))
        self._add_site(query.shape[:-2], rows, keys, fused=True)
        return out

    def softmax(self, func: Func, args: Args, kwargs: Kwargs) -> Tensor:
        out: Tensor = func(*args, **kwargs)
        if self._inside is not None:
            shapes = (out.shape[:-1], (*out.shape[:-2], out.shape[-1]))
            rows, keys = (_per_head(p, shape) for p, shape in zip(self._inside, shapes, strict=True))
            self._add_site(out.shape[:-2], rows, keys, fused=False, axis=out.ndim - 1)
            return out
        token_positions.follow(func, args, kwargs, out)
        axis = _argument(args, kwargs, 1, "dim")
        axis = (axis if axis is not None else -1) % out.ndim
        rows, keys = (
            None if p is None else p.movedim(axis, -1)
            for p in (token_positions.shadow(out), token_positions.columns(out))
        )
        if keys is not None and out.ndim >= 2:
            lead = keys.shape[:-2]
            self._add_site(lead, None if rows is None else rows[..., 0], keys[..., 0, :], fused=False, axis=axis)
        elif rows is not None and rows.shape[-1] > 1 and varies(rows, -1):
            self._add_site(rows.shape[:-1], None, rows, fused=False, axis=axis, context=True)
        elif rows is not None:
            self._skip("its softmax runs over channels, branches or classes, not over positions")
        else:
            self.survey.sites.append((self.where, None))
            self.survey.times.append(self.time)
            self.survey.other.setdefault(self.where, "the scores of its softmax have no positions in the image")
        return out

    def _add_site(
        self,
        lead: torch.Size,
        rows: Tensor | None,
        keys: Tensor | None,
        *,
        fused: bool,
        axis: int | None = None,
        context: bool = False,
    ) -> None:
        """Add the site of a call with the positions of queries and keys, or record why the call is not attention."""
        if keys is None:
            self._skip("the positions of its keys are not known", known=False)
            return
        if keys.isnan().all() or not varies(keys, -1):
            self._skip("it attends over channels or learned tokens, not over positions")
            return
        windows = tuple(i for i in range(len(lead)) if lead[i] > 1 and (varies(keys, i) or varies(rows, i)))
        heads = 1
        for i in range(len(lead)):
            heads *= 1 if i in windows else lead[i]
        keys_WN = per_window(keys, windows, len(lead))
        key_tokens = infer_tokens(keys_WN, self._whole, self._merges)
        query_tokens = None
        if rows is not None and not rows.isnan().all():
            query_tokens = infer_tokens(per_window(rows, windows, len(lead)), self._whole, self._merges)
        if not self._whole:
            self._attended.append(infer_axes(keys_WN))
        if key_tokens is None:
            self._skip("the positions of its keys form no grid", known=False)
            return
        kind: Kind = "cross" if query_tokens is None else "self"
        site = Site(
            self.where,
            kind,
            heads,
            query_tokens,
            key_tokens,
            fused,
            tuple(lead),
            windows,
            axis,
            context,
            0 if query_tokens is None or (self.class_token and query_tokens.num_prefix_tokens > 0) else None,
        )
        self.survey.sites.append((self.where, site))
        self.survey.times.append(self.time)
        self._mark_as_attending()

    def _skip(self, reason: str, *, known: bool = True) -> None:
        """Record why a call is not attention over positions, or, if `known` is false, why it is not understood."""
        self.survey.sites.append((self.where, None))
        self.survey.times.append(self.time)
        (self.survey.other if known else self.survey.unlabelled).setdefault(self.where, reason)
        self._mark_as_attending()

    def _mark_as_attending(self) -> None:
        for name in self.stack:
            if name in self.looks_like_attention:
                self.looks_like_attention[name] = True


_Key: TypeAlias = "tuple[tuple[tuple[tuple[int, ...], torch.device], ...], int]"

# Number of surveys kept of a model, e.g. for several image sizes. Without a limit they would fill the memory if an
# attribute of the model differs at each call, such as a counter.
_MAX_CACHED = 16

_surveys: "WeakKeyDictionary[nn.Module, dict[_Key, Survey]]" = WeakKeyDictionary()


def survey(module: nn.Module, args: Args, kwargs: Kwargs) -> Survey:
    """Return the survey of a module for the shapes of these arguments, from the cache if possible.

    If the model selects tokens depending on the image, every image is surveyed each time. The survey runs in evaluation
    mode, so it does not find a random selection of tokens that the model makes only during training.
    """
    key = _key(module, args, kwargs)
    known = _surveys.setdefault(module, {})
    if key not in known:
        if len(known) == _MAX_CACHED:
            known.pop(next(iter(known)))
        known[key] = _run_survey(module, args, kwargs)
    if not known[key].picks:
        return known[key]
    images = _images(args, kwargs)
    count = 0 if images is None else len(images)
    return _together([_run_survey(module, args, kwargs, number) for number in range(count)] or [known[key]])


def _together(surveys: list[Survey]) -> Survey:
    """Combine the surveys of single images into one survey; the positions of the tokens may differ."""
    combined = copy.copy(surveys[0])
    if len(surveys) == 1:
        return combined
    combined.unlabelled = dict(combined.unlabelled)
    combined.sites = []
    for (name, site), *others in zip(*(survey.sites for survey in surveys), strict=False):
        sites = [site, *(other for _, other in others)]
        if all(item is not None and site is not None and item.alike == site.alike for item in sites):
            of_images = cast("list[Site]", sites)
            keys, queries = _of_images([s.keys for s in of_images]), _of_images([s.queries for s in of_images])
            assert keys is not None
            site = replace(of_images[0], keys=keys, queries=queries)
        elif any(item is not None for item in sites):
            combined.unlabelled[name] = "its attention differs between the images of a batch"
            site = None
        combined.sites.append((name, site))
    combined.times = combined.times[: len(combined.sites)]
    by_time = [{activation.time: activation for activation in survey.activations} for survey in surveys]
    combined.activations = []
    for time, activation in by_time[0].items():
        same_time = [activations[time] for activations in by_time if time in activations]
        layouts = {(a.name, a.channel_axis, a.tokens.grid, a.tokens.index_WN.shape) for a in same_time}
        if len(same_time) == len(surveys) and len(layouts) == 1:
            tokens = _of_images([a.tokens for a in same_time])
            assert tokens is not None
            combined.activations.append(replace(activation, tokens=tokens))
    return combined


def _of_images(tokens: Sequence[Tokens | None]) -> Tokens | None:
    """Combine the tokens of single images into the tokens of a batch."""
    known = [item for item in tokens if item is not None]
    if not known:
        return None
    first = known[0]
    cells = torch.arange(first.grid[0] * first.grid[1])[None]
    homes = [cells if item.home_BG is None else item.home_BG for item in known]
    if all(
        torch.equal(item.index_WN, first.index_WN) and torch.equal(home, homes[0])
        for item, home in zip(known, homes, strict=True)
    ):
        return first
    merged = any(item.home_BG is not None for item in known)
    index_BWN = torch.stack([item.index_WN for item in known])
    return Tokens(first.grid, first.index_WN, index_BWN, torch.cat(homes) if merged else None)


def forget(module: nn.Module) -> None:
    """Remove the cached surveys of a module."""
    _surveys.pop(module, None)


def _key(module: nn.Module, args: Args, kwargs: Kwargs) -> _Key:
    """Return the cache key of a survey: the arguments' shapes without batch, their devices, and the model's state."""
    shapes = tuple((tuple(value.shape[1:]), value.device) for value in token_positions._tensors((args, kwargs)))
    return shapes, hash(tuple(map(_state, module.modules())))


def _state(module: nn.Module) -> object:
    fields, hooks = own_state(module)
    own = frozenset([(name, _hashable(value)) for name, value in fields.items()])
    return id(module), type(module), own, *hooks  # the number of a hook is never used twice


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def own_state(module: nn.Module) -> tuple[dict[str, Any], dict[int, Func]]:
    """Return what a module's forward pass depends on, apart from its class, weights and buffers.

    Returns:
        The module's attributes, including replaced methods; and its forward hooks by number, except visionattn's own.
    """
    fields = vars(module)
    own = {name: fields[name] for name in fields.keys() - _OF_EVERY_MODULE}
    hooks = {**fields.get("_forward_pre_hooks", {}), **fields.get("_forward_hooks", {})}
    return own, {n: hook for n, hook in hooks.items() if not _only_reads(hook)}


def _only_reads(hook: Func) -> bool:
    """Return whether a hook is one that visionattn sets while it reads a model, for a capture or a heatmap."""
    return isinstance(getattr(hook, "__self__", None), Watcher) or (getattr(hook, "__module__", None) or "").startswith(
        "visionattn.maps."
    )


def _hashable(value: object, depth: int = 0) -> object:
    """Return a hashable stand-in that changes when the value changes: None for tensors, the id for modules."""
    kind = type(value)
    if kind in (int, bool, float, str) or value is None:
        return value
    if depth == 3 or isinstance(value, (Tensor, nn.Module, type)):
        # tensors count as equal: a module that stores its last output would otherwise be surveyed at each call
        return None if isinstance(value, Tensor) else id(value)
    if isinstance(value, (tuple, list)):
        items = tuple([_hashable(item, depth + 1) for item in value])
        return items if any(item is not None for item in items) else None
    if isinstance(value, dict):
        return tuple([(str(key), _hashable(item, depth + 1)) for key, item in value.items()])
    # only to depth 2: the id of a copy at depth 3 would change at each call
    fields = getattr(value, "__dict__", {}) if depth < 2 else {}
    return id(value), kind, getattr(value, "__qualname__", ""), _hashable(dict(fields), depth + 1) if fields else None


def _images(args: Args, kwargs: Kwargs) -> Tensor | None:
    return next((v for v in token_positions._tensors((args, kwargs)) if v.ndim == 4 and v.is_floating_point()), None)


def _run_survey(module: nn.Module, args: Args, kwargs: Kwargs, number: int = 0) -> Survey:
    """Survey one image, given its number in the batch."""
    images = _images(args, kwargs)
    if images is None:
        return Survey()
    batch = len(images)

    def of_image(value: Any) -> Any:  # a user's model may take arguments of any type
        if isinstance(value, Tensor):
            if value.ndim == 0 or len(value) != batch:
                return value
            image = value[number : number + 1].clone() if batch else value.new_zeros(1, *value.shape[1:])
            if value is images:
                token_positions.cast(image, token_positions.image_positions(image))
            return image
        if isinstance(value, dict):
            return {key: of_image(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(map(of_image, value))
        return value

    with _quiet(module, images.device):
        inputs, named = of_image(args), of_image(kwargs)
        with Surveyor(module) as surveyor:
            module(*inputs, **named)
    candidates = surveyor.looks_like_attention
    surveyor.survey.missed = [
        name
        for name, attended in candidates.items()
        if not attended and not any(other.startswith(f"{name}.") for other in candidates if other != name)
    ]
    return surveyor.survey


@contextlib.contextmanager
def _quiet(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a survey in evaluation mode, without gradients, hidden from other watchers; restore the random state."""
    training = [part for part in module.modules() if part.training]
    devices = [device] if device.type == "cuda" else []
    try:
        for part in training:
            part.training = False
        with hidden_from_watchers(), torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def _per_head(positions_BN: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Repeat the positions of tokens, (B, N), for every head: (B, heads, N), or (B · heads, N)."""
    if positions_BN is None or positions_BN.shape[1] != shape[-1] or shape[0] % len(positions_BN):
        return None
    if len(shape) == 3:
        return positions_BN[:, None].expand(*shape)
    return positions_BN.repeat_interleave(shape[0] // len(positions_BN), 0)


def _argument(args: Args, kwargs: Kwargs, place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return ("attention" in name or "attn" in name or name.endswith("mla")) and not isinstance(
        module, (nn.Sequential, nn.ModuleList)
    )
