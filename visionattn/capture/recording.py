"""Recording of a model's attention: `with capture(model) as records: model(images)`.

Shapes: B images, W windows, H heads, Q queries, K keys, C channels, h × w grid; R glimpses in parallel,
T glimpses one after another, S scales.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor, nn

from visionattn.attention import Retina, View
from visionattn.capture.hooks import Args, Func, Kwargs, Watcher, gate_of
from visionattn.capture.records import Record, Records
from visionattn.capture.reductions import Call, ClassRow, Reduction
from visionattn.capture.running import unwrap
from visionattn.capture.survey import StaleSurveyError, Survey, forget, survey
from visionattn.capture.token_layout import LayoutError, Site
from visionattn.errors import UsageError, nearest, warn


class Interception(Watcher):
    """A watcher that finds the `Site` of every call of attention. Subclasses define what happens at each call.

    Attributes:
        found: the survey of the model.
        unplanned: module → how a call differs from the survey.
        turn: index of the current call of attention within the current call of the model, from 0.
    """

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
        """Return whether to handle this call of attention."""
        return True

    def passed(self, site: Site) -> None:
        """Handle a call that `wants` declined."""

    def attended(self, call: Call, out: Tensor, kept: Tensor | None) -> Tensor | None:
        """Handle a finished call of attention.

        Args:
            call: the call.
            out: the output of a fused call, or the weights of a softmax.
            kept: the tensor to keep, if `instead` has computed it; otherwise None.

        Returns:
            A tensor to replace `out`, or None.
        """
        return None

    def instead(self, call: Call) -> tuple[Tensor, Tensor] | None:
        """Compute the tensor to keep and the output (B, W, H, Q, D), in place of a fused call.

        Returns:
            The tensor and the output; None to run the fused call.
        """
        return None

    def begin(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        self._root, self._seen, self.turn = module, {}, -1
        self.found = survey(module, args, kwargs)
        prefix = self.names[module]
        self._plan = {}
        for name, site in self.found.sites:
            self._plan.setdefault(f"{prefix}.{name}".strip("."), []).append(site)
        self._gates_on_grid = {f"{prefix}.{name}".strip(".") for name, on_grid in self.found.gates.items() if on_grid}

    def end(self) -> None:
        for name, sites in self._plan.items():
            if (count := self._seen.get(name, 0)) < len(sites):
                self._differs(name, f"it attended {count} times, and {len(sites)} times when the model was surveyed")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if kind is None:
            self.check()

    def check(self) -> None:
        """Check that the model ran as it did when it was surveyed. Called when the context ends without an error.

        Raises:
            StaleSurveyError: the model ran differently; its survey is removed from the cache.
        """
        for name, reason in self.unplanned.items():
            raise StaleSurveyError(f"the model ran differently than in its survey: {name}: {reason}")

    def _differs(self, name: str, reason: str) -> None:
        self.unplanned[name] = reason
        forget(self._root)

    def _next(self, fused: bool) -> Site | None:
        name = self.where
        turn = self._seen[name] = self._seen.get(name, 0) + 1
        sites = self._plan.get(name, [])
        if turn > len(sites) or ((site := sites[turn - 1]) is not None and site.fused != fused):
            self._differs(name, "it did not attend in this way when the model was surveyed")
            return None
        return site

    def fused(self, func: Func, args: Args, kwargs: Kwargs) -> object:
        call = self._call(self._next(fused=True), lambda site: Call.fused(site, args, kwargs))
        if call is None:
            return func(*args, **kwargs)
        assert call.query is not None
        both = None
        # a replaced call would be invisible to other watchers, and might not have the dtype that autocast chooses
        if not torch._C._len_torch_function_stack() and not torch.is_autocast_enabled(call.query.device.type):
            both = self.instead(call)
        if both is None:
            return self._report_call(call, func(*args, **kwargs))
        kept, out = both
        return self._report_call(call, out.flatten(0, 1), kept)

    def softmax(self, func: Func, args: Args, kwargs: Kwargs) -> object:
        site = self._next(fused=False)
        out = func(*args, **kwargs)
        call = self._call(site, lambda site: Call.eager(site, out))
        return out if call is None else self._report_call(call, out)

    def _call(self, site: Site | None, read: Callable[[Site], Call]) -> Call | None:
        """Return the call at a site; None if it needs no handling."""
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
                raise LayoutError(f"{site.name} has {has} keys, but it had {had} when the model was surveyed")
            return call
        except LayoutError as error:
            self._differs(self.where, str(error))
            return None

    def _report_call(self, call: Call, out: Tensor, kept: Tensor | None = None) -> Tensor:
        with torch._C.DisableTorchFunction(), _plain(out):  # hides these computations from other watchers
            replaced = self.attended(call, out, kept)
        return out if replaced is None else replaced


def _plain(like: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast, so that the watcher computes in float32."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


class capture(Interception):  # noqa: N801 - used as `with capture(model) as records`
    """Record the attention of a model while it runs. The model does not change.

        >>> import timm, torch
        >>> vit = timm.create_model("test_vit", img_size=160)
        >>> with torch.no_grad(), capture(vit) as records:
        ...     logits = vit(torch.rand(2, 3, 160, 160))
        >>> records[-1]
        Record(blocks.5.attn: self, grid 10×10, 2 heads, weights (2, 1, 2, 101))

    The outputs do not change either, except by rounding in two cases: `HeadMean` computes the output of attention
    itself; and layers that torch would run as one kernel (`nn.TransformerEncoder` in evaluation mode without gradients)
    run operation by operation. Attention stays fused: the weights to keep are computed a second time from queries and
    keys. If the model is called several times, the records are appended, and `Record.call` is the number of the call.

    The first call with an image size also surveys the model: one image runs through the model together with the
    positions of its pixels. So the survey finds where each token lies (see `survey.py`). It is cached as long as the
    model exists. If a model selects tokens depending on the image, every image of every call is surveyed, and
    `Tokens.index_BWN` holds the positions for each image.

    Args:
        model: any vision model, from timm, torchvision, transformers or your own; it may be compiled or wrapped in DDP.
        keep: the weights to keep of each call (default: `ClassRow()`); see `reductions.py`.
        layers: names of modules, or indices of calls of attention in order (−1: the last), whose weights are kept
            (default: all).
        strict: raise a StaleSurveyError on exit if the model did not run as it did when it was surveyed; False warns.

    Raises:
        UsageError: the model is scripted; a layer in `layers` does not exist; or, on exit, the model was called but no
            attention, gate or glimpse was found.
    """

    def __init__(
        self,
        model: nn.Module,
        keep: Reduction | None = None,
        *,
        layers: Sequence[int | str] | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(unwrap(model))
        self.strict = strict
        self.keep = keep or ClassRow()
        self.layers = layers
        self.records = Records()
        self._wanted: set[int] | None = None
        self._looking: dict[Retina, tuple[View, int, int]] = {}  # last view and call of a retina, index of its record

    def __enter__(self) -> Records:  # type: ignore[override] # users want the records, not the watcher
        super().__enter__()
        return self.records

    def check(self) -> None:
        if self.records.calls and not self.records:
            raise UsageError(nothing_attends(self.model, self.records))
        if self.strict:
            super().check()
        for name, reason in self.unplanned.items():
            warn(f"the records lack attention, since the model ran differently than in its survey: {name}: {reason}")
            break

    def begin(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        super().begin(module, args, kwargs)
        names = [site.name for site in self.found.attention]
        self._wanted = None if self.layers is None else {place(layer, names) for layer in self.layers}
        self.records.unlabelled |= self.found.unlabelled
        self.records.other |= self.found.other
        self.records.missed += [name for name in self.found.missed if name not in self.records.missed]

    def end(self) -> None:
        super().end()
        self.records.unlabelled |= self.unplanned
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
        patches = look(view, location_BR2)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            location_BR12 = location_BR2.detach().float().clone()[:, :, None]
            boxes_BR1S4 = retina.boxes(location_BR12, view.size)
            records, call = self.records._records, self.records.calls
            before = self._looking.get(retina)
            # glimpses share a record if they belong to one call of the model; outside of calls, if they read one view
            if before is not None and (before[0] is view or (self.stack and before[1] == call)):
                record = records[before[2]]
                assert record.locations is not None
                assert record.boxes is not None
                if record.grid == view.size and record.locations.shape[:2] == location_BR2.shape[:2]:
                    locations = torch.cat([record.locations, location_BR12], 2)
                    boxes = torch.cat([record.boxes, boxes_BR1S4], 2)
                    records[before[2]] = replace(record, locations=locations, boxes=boxes)
                    return patches
            self._looking[retina] = view, call, len(records)
            name = self.names[retina]
            records.append(Record(name, "glimpse", view.size, 0, 1, None, None, None, call, location_BR12, boxes_BR1S4))
        return patches

    def leave(self, name: str, module: nn.Module, args: Args, kwargs: Kwargs, out: object) -> None:
        gate = gate_of(name, module, out, along_row=name in self._gates_on_grid)
        if gate is not None:
            kind, weights = gate
            grid = (weights.shape[2], weights.shape[3])
            kept = weights.detach().float().clone()
            self.records._records.append(Record(name, kind, grid, 0, 1, None, None, kept, self.records.calls))


def nothing_attends(model: nn.Module, records: Records) -> str:
    """Return the error message for a model that does not attend, with the reasons."""
    reasons = [f"{name}: {why}" for name, why in (records.unlabelled | records.other).items()]
    reasons += [
        f"{name} looks like attention but calls neither scaled_dot_product_attention nor softmax"
        for name in records.missed
    ]
    because = f" ({'; '.join(reasons[:3])})" if reasons else ""
    return (
        f"nothing in this {type(model).__name__} attends{because}; "
        "methods that fit: gradcam, layercam, scorecam, eigencam"
    )


def place(layer: int | str, names: list[str]) -> int:
    """Return the index of a layer among the layers that attend.

    Args:
        layer: the layer's index (−1: the last), the layer's name, or the name of a module around the layer. If several
            layers inside that module attend, the last of them is meant.
        names: names of the layers that attend, in order.

    Raises:
        UsageError: there is no such layer; the message lists the nearest names.
    """
    if isinstance(layer, int):
        if not -len(names) <= layer < len(names):
            numbers = f", 0 to {len(names) - 1}" if names else ""
            raise UsageError(f"there is no layer {layer}: the model has {len(names)} layers of attention{numbers}")
        return layer % len(names)
    if layer in names:
        return names.index(layer)
    inside = [place for place, name in enumerate(names) if name.startswith(f"{layer}.")]
    if not inside:
        known = nearest(layer, names) or f" Layers that attend: {', '.join(names[:3])} …"
        raise UsageError(f"nothing attends in {layer!r}.{known}")
    return inside[-1]
