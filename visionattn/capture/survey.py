"""Which calls in a model are attention, and where their queries and keys lie in the image.

A survey runs one image through the model with its positions beside it (`token_positions.py`) and is remembered for
as long as the model lives; where the model picks its tokens by what an image shows, each image is surveyed each time.
Meanwhile the model is in evaluation mode and without gradients; its flags and the random state are put back.

Shapes: B images, W windows, Q queries, K keys, h × w grid.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.attention.hard.retina import Retina, View
from visionattn.capture import token_positions
from visionattn.capture.hooks import Watcher, gate_of, unheard
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


@dataclass
class Survey:
    """What was found in a model.

    Attributes:
        sites: calls of attention, in order; None for softmaxes that are no attention over positions.
        times: of each site, comparable with those of activations.
        activations: outputs that lie on a grid, in order.
        unlabelled: module → why a softmax or a fused call there is not understood.
        other: module → what else its softmax runs over: channels, branches, classes.
        missed: modules that look like attention and were not seen to attend.
        gates: names of the gates, and whether they lie on a grid.
        glimpses: names of the retinas that looked.
        picks: the model picks tokens by what the image shows, so that they lie elsewhere in every image.
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
        return [site for _, site in self.sites if site is not None]


class Surveyor(Watcher):
    """Runs beside one image and finds the sites."""

    follows = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.survey = Survey()
        self.time = 0
        self.looks: dict[str, bool] = {}
        self._inside: tuple[Tensor | None, ...] | None = None
        self._layouts: dict[int, tuple[Tensor, tuple[Tokens, int] | None]] = {}
        self._whole: list[Axes] = []  # of grids before tokens were dropped
        self._seen: list[Axes] = []  # of grids that attention ran over
        self._merges: list[Merge] = []
        tokens = [part.cls_token for part in model.modules() if hasattr(part, "cls_token")]
        self.class_token = not tokens or any(token is not None for token in tokens)

    def watched(self, module: nn.Module) -> bool:
        return not isinstance(module, nn.Softmax)  # the module around it is the one that attends

    def enter(self, name: str, module: nn.Module) -> None:
        if _looks_like_attention(module):
            self.looks.setdefault(name, False)

    def leave(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.time += 1
        along_row = False
        if isinstance(out, Tensor) and out.ndim == 4 and out.shape[1:3] == (1, 1):
            with torch._C.DisableTorchFunction():
                along_row = varies(token_positions.shadow(out), 3)
        if (gate := gate_of(name, module, out, along_row=along_row)) is not None:
            self.survey.gates[name] = gate[0] == "spatial_gate" and gate[1].shape[2:].numel() > 1
            for outer in self.stack:
                self.looks[outer] = True
        with torch._C.DisableTorchFunction():  # what is computed here is none of the model's
            token_positions.follow_module(args, kwargs, out)
            value = out[0] if isinstance(out, (tuple, list)) and out else out
            if isinstance(value, Tensor) and (found := token_positions.shadow(value)) is not None:
                lie = self._lie(found)
                if lie is not None:
                    self.survey.activations.append(Activation(name, *lie, self.time))

    def _lie(self, found: Tensor) -> "tuple[Tokens, int] | None":
        if id(found) not in self._layouts:  # outputs share their shadow until something moves
            self._layouts[id(found)] = (found, infer_layout(found, self._whole, self._merges))
        return self._layouts[id(found)][1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        token_positions.depend(args, kwargs or {}, out)
        return out

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is not F.multi_head_attention_forward:
            out = func(*args, **kwargs)
            if (pick := token_positions.picked(func, args, kwargs)) is not None:
                among, by_content = pick
                self.survey.picks |= by_content
                self._whole += [*self._seen, infer_axes(among)]
                self._seen = []
            if (merge := token_positions.merged(func, args, kwargs)) is not None:
                self._merges.append(merge)
            token_positions.follow(func, args, kwargs, out)
            return out
        # what happens inside cannot be followed, so `fused` and `softmax` are told where queries and keys lie
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
        with torch._C.DisableTorchFunction():  # each image is seen elsewhere: what follows has no place in the survey
            return look(view, location_BR2)

    def fused(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        out = func(*args, **kwargs)
        query, key = _argument(args, kwargs, 0, "query"), _argument(args, kwargs, 1, "key")
        if self._inside is None:
            rows, keys = token_positions.attend(query, key, out)
        else:
            rows, keys = (_per_head(p, x.shape[:-1]) for p, x in zip(self._inside, (query, key), strict=True))
        self._found(query.shape[:-2], rows, keys, fused=True)
        return out

    def softmax(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        out = func(*args, **kwargs)
        if self._inside is not None:
            shapes = (out.shape[:-1], (*out.shape[:-2], out.shape[-1]))
            rows, keys = (_per_head(p, shape) for p, shape in zip(self._inside, shapes, strict=True))
            self._found(out.shape[:-2], rows, keys, fused=False, axis=out.ndim - 1)
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
            self._found(lead, None if rows is None else rows[..., 0], keys[..., 0, :], fused=False, axis=axis)
        elif rows is not None and rows.shape[-1] > 1 and varies(rows, -1):
            self._found(rows.shape[:-1], None, rows, fused=False, axis=axis, context=True)
        elif rows is not None:
            self._skip("its softmax runs over channels, branches or classes, not over positions")
        else:
            self.survey.sites.append((self.where, None))
            self.survey.times.append(self.time)
            self.survey.other.setdefault(self.where, "the scores of its softmax have no place in the image")
        return out

    def _found(
        self,
        lead: torch.Size,
        rows: Tensor | None,
        keys: Tensor | None,
        *,
        fused: bool,
        axis: int | None = None,
        context: bool = False,
    ) -> None:
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
            self._seen.append(infer_axes(keys_WN))
        if key_tokens is None:
            self._skip("the positions of its keys make no grid", known=False)
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
        for name in self.stack:
            if name in self.looks:
                self.looks[name] = True

    def _skip(self, reason: str, *, known: bool = True) -> None:
        self.survey.sites.append((self.where, None))
        self.survey.times.append(self.time)
        (self.survey.other if known else self.survey.unlabelled).setdefault(self.where, reason)
        for name in self.stack:
            if name in self.looks:
                self.looks[name] = True


_surveys: "WeakKeyDictionary[nn.Module, dict[Any, Survey]]" = WeakKeyDictionary()


def survey(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Survey:
    """Find the sites of a module that is called with these arguments; remembered.

    Where the model picks tokens by what the image shows, every image is surveyed, each time; in evaluation mode, so
    what it picks by chance while training is not found.
    """
    key = _key(module, args, kwargs)
    known = _surveys.setdefault(module, {})
    if key not in known:
        known[key] = _run_survey(module, args, kwargs)
    if not known[key].picks:
        return known[key]
    images = _images(args, kwargs)
    count = 0 if images is None else len(images)
    return _together([_run_survey(module, args, kwargs, number) for number in range(count)] or [known[key]])


def _together(surveys: list[Survey]) -> Survey:
    """One survey of many images whose tokens lie elsewhere in each."""
    found = copy.copy(surveys[0])
    if len(surveys) == 1:
        return found
    found.unlabelled = dict(found.unlabelled)
    found.sites = []
    for (name, site), *others in zip(*(one.sites for one in surveys), strict=False):
        sites = [site, *(other for _, other in others)]
        if all(one is not None and site is not None and one.alike == site.alike for one in sites):
            of_images = cast("list[Site]", sites)
            keys, queries = _each([one.keys for one in of_images]), _each([one.queries for one in of_images])
            assert keys is not None
            site = replace(of_images[0], keys=keys, queries=queries)
        elif any(one is not None for one in sites):
            found.unlabelled[name] = "it attends otherwise in one image than in another"
            site = None
        found.sites.append((name, site))
    found.times = found.times[: len(found.sites)]
    by_time = [{activation.time: activation for activation in one.activations} for one in surveys]
    found.activations = []
    for time, activation in by_time[0].items():
        all_ = [one[time] for one in by_time if time in one]
        layouts = {(one.name, one.channel_axis, one.tokens.grid, one.tokens.index_WN.shape) for one in all_}
        if len(all_) == len(surveys) and len(layouts) == 1:
            tokens = _each([one.tokens for one in all_])
            assert tokens is not None
            found.activations.append(replace(activation, tokens=tokens))
    return found


def _each(tokens: Sequence[Tokens | None]) -> Tokens | None:
    """Where those of each image lie."""
    known = [one for one in tokens if one is not None]
    if not known:
        return None
    first = known[0]
    cells = torch.arange(first.grid[0] * first.grid[1])[None]
    homes = [cells if one.home_BG is None else one.home_BG for one in known]
    if all(
        torch.equal(one.index_WN, first.index_WN) and torch.equal(home, homes[0])
        for one, home in zip(known, homes, strict=True)
    ):
        return first
    merged = any(one.home_BG is not None for one in known)
    index_BWN = torch.stack([one.index_WN for one in known])
    return Tokens(first.grid, first.index_WN, index_BWN, torch.cat(homes) if merged else None)


def forget(module: nn.Module) -> None:
    """Survey a module anew when it is next called."""
    _surveys.pop(module, None)


def _key(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shapes = tuple((tuple(value.shape[1:]), value.device) for value in token_positions._tensors((args, kwargs)))
    structure = hash(tuple(map(id, module.modules())))
    return shapes, structure


def _images(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((v for v in token_positions._tensors((args, kwargs)) if v.ndim == 4 and v.is_floating_point()), None)


def _run_survey(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int = 0) -> Survey:
    """Survey one image, by its number in the batch."""
    images = _images(args, kwargs)
    if images is None:
        return Survey()
    batch = len(images)

    def one_of(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.ndim == 0 or len(value) != batch:
                return value
            one = value[number : number + 1].clone() if batch else value.new_zeros(1, *value.shape[1:])
            if value is images:
                token_positions.cast(one, token_positions.image_positions(one))
            return one
        if isinstance(value, dict):
            return {key: one_of(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(map(one_of, value))
        return value

    with _quiet(module, images.device):
        inputs, named = one_of(args), one_of(kwargs)
        with Surveyor(module) as surveyor:
            module(*inputs, **named)
    found = surveyor.survey
    seen = surveyor.looks
    found.missed = [
        name
        for name, attended in seen.items()
        if not attended and not any(other.startswith(f"{name}.") for other in seen if other != name)
    ]
    return found


@contextlib.contextmanager
def _quiet(module: nn.Module, device: torch.device) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    devices = [device] if device.type == "cuda" else []
    try:
        for part in training:
            part.training = False
        with unheard(), torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def _per_head(positions_BN: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Give every head the positions of its tokens: (B, heads, N), or (B · heads, N)."""
    if positions_BN is None or positions_BN.shape[1] != shape[-1] or shape[0] % len(positions_BN):
        return None
    if len(shape) == 3:
        return positions_BN[:, None].expand(*shape)
    return positions_BN.repeat_interleave(shape[0] // len(positions_BN), 0)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return ("attention" in name or "attn" in name or name.endswith("mla")) and not isinstance(
        module, (nn.Sequential, nn.ModuleList)
    )
