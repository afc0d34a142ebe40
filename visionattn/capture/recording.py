"""Watch a model attend: `with capture(model) as records: model(images)`.

Shapes: B images, W windows, H heads, Q queries, K keys, C channels, h × w grid; R looks at once, T glimpses, S scales.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.attention.hard.retina import Retina, View
from visionattn.capture.hooks import Watcher, gate_of
from visionattn.capture.records import Record, Records
from visionattn.capture.reductions import Call, ClassRow, Keep
from visionattn.capture.running import unwrap
from visionattn.capture.survey import Survey, forget, survey
from visionattn.capture.token_layout import LayoutError, Site
from visionattn.errors import UsageError, nearest


class Interception(Watcher):
    """Knows the site of every call of attention as it happens; subclasses say what to do there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.found = Survey()
        self.unplanned: dict[str, str] = {}
        self._plan: dict[str, list[Site | None]] = {}
        self._gates_on_grid: set[str] = set()
        self._seen: dict[str, int] = {}
        self._root: nn.Module = model
        self.turn = -1

    def wants(self, site: Site) -> bool:
        """Whether to look at this call of attention, whose place in the order is `turn`."""
        return True

    def passed(self, site: Site) -> None:
        """A call was not wanted."""

    def attended(self, call: Call, out: Tensor, kept: Tensor | None) -> Tensor | None:
        """A call of attention has returned `out`: the fused output, or the weights; a tensor returned replaces it.

        `kept` is what `instead` computed on the way, None where it did not.
        """
        return None

    def instead(self, call: Call) -> tuple[Tensor, Tensor] | None:
        """A fused call is about to run; compute what to keep together with the call's output (B, W, H, Q, D), which
        takes the place of what it would return."""
        return None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._root, self._seen, self.turn = module, {}, -1
        self.found = survey(module, args, kwargs)
        prefix = self.names[module]
        self._plan = {}
        for name, site in self.found.sites:
            self._plan.setdefault(f"{prefix}.{name}".strip("."), []).append(site)
        self._gates_on_grid = {f"{prefix}.{name}".strip(".") for name, on_grid in self.found.gates.items() if on_grid}

    def _next(self, fused: bool) -> Site | None:
        name = self.where
        turn = self._seen[name] = self._seen.get(name, 0) + 1
        sites = self._plan.get(name, [])
        if turn > len(sites) or ((site := sites[turn - 1]) is not None and site.fused != fused):
            self.unplanned[name] = "it was not seen to attend when the model was surveyed"
            forget(self._root)
            return None
        return site

    def fused(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._call(self._next(fused=True), lambda site: Call.fused(site, args, kwargs))
        if call is None:
            return func(*args, **kwargs)
        assert call.query is not None
        both = None
        # other watchers would not hear of a call that is replaced, and autocast may want another type
        if not torch._C._len_torch_function_stack() and not torch.is_autocast_enabled(call.query.device.type):
            both = self.instead(call)
        if both is None:
            return self._tell(call, func(*args, **kwargs))
        kept, out = both
        return self._tell(call, out.flatten(0, 1), kept)

    def softmax(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        site = self._next(fused=False)
        out = func(*args, **kwargs)
        call = self._call(site, lambda site: Call.eager(site, out))
        return out if call is None else self._tell(call, out)

    def _call(self, site: Site | None, read: Callable[[Site], Call]) -> Call | None:
        """The call at a site; None where it is not to be looked at."""
        if site is None:
            return None
        self.turn += 1
        if not self.wants(site):
            self.passed(site)
            return None
        try:
            call = read(site)
            had, has = site.keys.index_WN.shape[1], call.shape[4]
            if had != has:
                raise LayoutError(f"{site.name} now has {has} keys, and had {had} when the model was surveyed")
            return call
        except LayoutError as error:
            self.unplanned[self.where] = str(error)
            forget(self._root)
            return None

    def _tell(self, call: Call, out: Tensor, kept: Tensor | None = None) -> Tensor:
        with torch._C.DisableTorchFunction(), _plain(out):  # other watchers do not hear of what is computed here
            replaced = self.attended(call, out, kept)
        return out if replaced is None else replaced


def _plain(like: Any) -> contextlib.AbstractContextManager[Any]:
    """Autocast off: what is computed beside the model is computed in float32."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


class capture(Interception):  # noqa: N801 - used as `with capture(model) as records`
    """Record where a model attends, while it runs as it always does.

        >>> import timm, torch
        >>> vit = timm.create_model("test_vit", img_size=160)
        >>> with torch.no_grad(), capture(vit) as records:
        ...     logits = vit(torch.rand(2, 3, 160, 160))
        >>> records[-1]
        Record(blocks.5.attn: self, grid 10×10, 2 heads, weights (2, 1, 2, 101))

    The model's outputs are those it gives without: attention stays fused, and what is kept is computed beside it from
    queries and keys. Several calls of the model add up; `Record.call` tells them apart.

    The first time that a model meets an image size, one image is run beside its positions to find out where each token
    lies (`sites.py`); that is remembered while the model lives. Where a model picks its tokens by what an image shows,
    every image of every call is run so, and `Tokens.index_BWN` says where its tokens lie.

    Args:
        model: any vision model: timm, torchvision, transformers or your own; compiled and DDP ones too.
        keep: what to keep of each call, `ClassRow()` unless given; see `keep.py`.
        layers: which calls of attention to keep weights of: names of modules, or places in their order, −1 the last;
            None for all.

    Raises:
        UsageError: the model is scripted, or no layer has this name; on leaving, if the model ran and nothing attended.
    """

    def __init__(
        self, model: nn.Module, keep: Keep | None = None, *, layers: Sequence[int | str] | None = None
    ) -> None:
        super().__init__(unwrap(model))
        self.keep = keep or ClassRow()
        self.layers = layers
        self.records = Records()
        self._wanted: set[int] | None = None
        self._looking: dict[Retina, tuple[View, int, int]] = {}  # the view, the call, the place of the record

    def __enter__(self) -> Records:  # type: ignore[override]
        super().__enter__()
        return self.records

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.records.unlabelled |= self.unplanned
        if error[0] is None and self.records.calls and not self.records:
            raise UsageError(nothing_attends(self.model, self.records))

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().begin(module, args, kwargs)
        names = [site.name for site in self.found.attention]
        self._wanted = None if self.layers is None else {place(layer, names) for layer in self.layers}
        self.records.unlabelled |= self.found.unlabelled
        self.records.other |= self.found.other
        self.records.missed += [name for name in self.found.missed if name not in self.records.missed]

    def end(self) -> None:
        self.records.calls += 1

    def wants(self, site: Site) -> bool:
        return self._wanted is None or self.turn in self._wanted

    def passed(self, site: Site) -> None:
        self._record(site, None)

    def instead(self, call: Call) -> tuple[Tensor, Tensor] | None:
        return self.keep.instead(call)

    def attended(self, call: Call, out: Tensor, kept: Tensor | None) -> None:
        if kept is None:
            with torch.no_grad():
                kept = self.keep(call)
        self._record(call.site, kept)

    def _record(self, site: Site, weights: Tensor | None) -> None:
        self.records._records.append(
            Record(
                self.where,
                site.kind,
                site.grid,
                site.num_prefix_tokens,
                site.heads,
                site.queries,
                site.keys,
                weights,
                self.records.calls,
            )
        )

    def looked(
        self, retina: Retina, look: Callable[[View, Tensor], Tensor], view: View, location_BR2: Tensor
    ) -> Tensor:
        seen = look(view, location_BR2)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            location_BR12 = location_BR2.detach().float().clone()[:, :, None]
            boxes_BR1S4 = retina.boxes(location_BR12, view.size)
            records, call = self.records._records, self.records.calls
            before = self._looking.get(retina)
            # the same call, or the same view where the model is not called but a method of it
            if before is not None and (before[0] is view or (self.stack and before[1] == call)):
                record = records[before[2]]
                assert record.locations is not None
                assert record.boxes is not None
                if record.grid == view.size and record.locations.shape[:2] == location_BR2.shape[:2]:
                    locations = torch.cat([record.locations, location_BR12], 2)
                    boxes = torch.cat([record.boxes, boxes_BR1S4], 2)
                    records[before[2]] = replace(record, locations=locations, boxes=boxes)
                    return seen
            self._looking[retina] = view, call, len(records)
            name = self.names[retina]
            records.append(Record(name, "glimpse", view.size, 0, 1, None, None, None, call, location_BR12, boxes_BR1S4))
        return seen

    def leave(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        gate = gate_of(name, module, out, along_row=name in self._gates_on_grid)
        if gate is not None:
            kind, weights = gate
            grid = (weights.shape[2], weights.shape[3])
            kept = weights.detach().float().clone()
            self.records._records.append(Record(name, kind, grid, 0, 1, None, None, kept, self.records.calls))


def nothing_attends(model: nn.Module, records: Records) -> str:
    """Say that a model never attended, and what was seen instead."""
    reasons = [f"{name}: {why}" for name, why in (records.unlabelled | records.other).items()]
    reasons += [
        f"{name} looks like attention and calls neither scaled_dot_product_attention nor softmax"
        for name in records.missed
    ]
    seen = f" ({'; '.join(reasons[:3])})" if reasons else ""
    return (
        f"nothing in this {type(model).__name__} attends{seen}; methods that fit: gradcam, layercam, scorecam, eigencam"
    )


def place(layer: int | str, names: list[str]) -> int:
    """Find a layer among the names of those that attend: by its place, its name, or that of a module around it.

    Raises:
        UsageError: there is none; the message lists the nearest.
    """
    if isinstance(layer, int):
        if not -len(names) <= layer < len(names):
            raise UsageError(f"there is no layer {layer}: the model attends {len(names)} times")
        return layer % len(names)
    if layer in names:
        return names.index(layer)
    inside = [place for place, name in enumerate(names) if name.startswith(f"{layer}.")]
    if not inside:
        known = nearest(layer, names) or f" Layers that attend: {', '.join(names[:3])} …"
        raise UsageError(f"nothing attends in {layer!r}.{known}")
    return inside[-1]
