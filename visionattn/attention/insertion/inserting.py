"""Insert a mechanism into a network.

Shapes: B batch, C channels, h rows and w columns of the feature map at an insertion point.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from visionattn.attention.insertion.insertion_points import Layout, Places
from visionattn.attention.self_attention.token_reduction import refuse_reduced_tokens
from visionattn.errors import UsageError

_CHILD = "inserted"


class Inserted(nn.Module):
    """A mechanism at an insertion point, by default with a learned scale γ that starts at 0.

        out = x + γ (mechanism(x) − x),    γ = 0 at first

    With γ = 0 the network's outputs do not change (except that −0 may become 0). With γ = 1 the mechanism is applied
    as in its paper. Each insertion point has one γ. ReZero scales residual branches in this way (Bachlechner et al.
    2021, 2003.04887, eq. 3); here the branch is mechanism(x) − x.

    Args:
        mechanism: (B, C, h, w) → the same.
        layout: how the module's output stores the feature map.
        preserve: True (default) uses γ; False gives out = mechanism(x), as in the mechanism's paper.

    Shape: as `layout` describes → the same; prefix tokens do not change.
    """

    def __init__(self, mechanism: nn.Module, layout: Layout, *, preserve: bool = True) -> None:
        super().__init__()
        self.mechanism = mechanism
        self.layout = layout
        # shape (1,): fully sharded training rejects scalar parameters
        self.gamma = nn.Parameter(torch.zeros(1)) if preserve else None

    def forward(self, x: Tensor) -> Tensor:
        maps_BChw = self.layout.to_maps(x)
        attended_BChw = self.mechanism(maps_BChw).to(x.dtype)  # under autocast a mechanism may change the dtype
        if self.gamma is not None:
            # lerp subtracts in a wider type: in half precision the difference could be inf, and 0 · inf is NaN
            attended_BChw = torch.lerp(maps_BChw, attended_BChw, self.gamma.to(x.dtype))
        return self.layout.from_maps(attended_BChw, x)

    def after(self, module: nn.Module, args: object, output: Any) -> Any:
        """Apply the mechanism to a module's output. This is a forward hook of the module that the mechanism follows."""
        if self.layout.item is None:
            return self(output)
        old = output[self.layout.item]
        new = self(old)
        return tuple(new if item is old else item for item in output)  # some networks return a tensor twice


class Insertion:
    """The mechanisms that `insert` put into a model.

    Attributes:
        places: name of a module → the mechanism inserted after it.
    """

    def __init__(self, places: dict[str, Inserted], handles: list[RemovableHandle], hosts: list[nn.Module]) -> None:
        self.places = places
        self._handles = handles
        self._hosts = hosts

    def __len__(self) -> int:
        return len(self.places)

    def __repr__(self) -> str:
        parts = [
            f"{name}: {type(part.mechanism).__name__}"
            + (f", γ = {part.gamma.item():.3g}" if part.gamma is not None else "")
            for name, part in self.places.items()
        ]
        return f"Insertion({'; '.join(parts)})"

    def remove(self) -> None:
        """Remove all mechanisms, and so restore the model. A second call has no effect."""
        for handle in self._handles:
            handle.remove()
        for host in self._hosts:
            delattr(host, _CHILD)
        self._handles, self._hosts = [], []


def insert(
    model: nn.Module,
    mechanism: Callable[[int], nn.Module],
    *,
    at: str | Sequence[str] = "stages",
    preserve: bool = True,
    image: Tensor | None = None,
) -> Insertion:
    """Insert a mechanism into a network, in place.

    With the default `preserve=True`, the network's outputs do not change at first. A state dict of the original network
    still loads strictly, although it lacks the keys of the mechanisms. The modules keep their names. A mechanism
    becomes the child `inserted` of the module before it (of the last item, if that module is a Sequential).

        >>> import timm, visionattn as va
        >>> model = timm.create_model("resnet18")
        >>> va.insert(model, va.attention.CBAM, at=["layer3", "layer4"])
        Insertion(layer3: CBAM, γ = 0; layer4: CBAM, γ = 0)

    Args:
        model: a network of timm, torchvision or your own, or a part of one.
        mechanism: called with the number of channels C, returns a mechanism for maps (B, C, h, w), e.g.
            `visionattn.attention.CBAM`. Channels-last maps and tokens are rearranged to (B, C, h, w) for the mechanism;
            class and register tokens pass unchanged.
        at: `"stages"` (default): after each stage. `"blocks"`: after each block. `"branches"`: at the end of every
            residual branch, before the addition. Or one or several names of modules, in which * stands for one part of
            a name: `"layer4.*.bn3"`, `["layer3", "layer4"]`. Modules that do not affect the output are skipped unless
            named.
        preserve: True (default) starts with γ = 0, see `Inserted`; False applies the mechanism as in its paper.
        image: (C, H, W), an example of the network's input (default: the size that the model is configured for).
            Required for a network with tokens if the aspect ratio of your images differs from the default.

    Returns:
        The inserted mechanisms, by the name of the module before each; `remove()` undoes the insertion.

    Raises:
        UsageError: `at` matches no insertion point; the network does not run on the image; an insertion point has a
            mechanism already; `mechanism` cannot be made for its channels; or the network's tokens are reduced. The
            network is then unchanged.
    """
    refuse_reduced_tokens(model)
    places = Places(model, image, skip=Inserted)
    modules = dict(model.named_modules())
    inserted: dict[str, Inserted] = {}
    hosts: list[nn.Module] = []
    hooked: list[nn.Module] = []
    for name in _names(places, at):
        holder, place = places.holder(name)
        if hasattr(modules[holder], _CHILD) or modules[holder] in hosts:
            raise UsageError(
                f"{name} of this {places.kind} has a mechanism inserted already; call remove() of that insertion "
                "first, or choose another place"
            )
        inserted[name] = _make(mechanism, name, places, preserve).train(modules[name].training)
        hosts.append(modules[holder])
        hooked.append(modules[place])
    parts = list(inserted.values())
    handles = [module.register_forward_hook(part.after) for module, part in zip(hooked, parts, strict=True)]
    for host, part in zip(hosts, parts, strict=True):
        host.add_module(_CHILD, part)
    keys = tuple(f"{name}." for name, module in model.named_modules() if any(module is part for part in parts))
    handles.append(model.register_load_state_dict_pre_hook(partial(fill_missing, keys)))
    if any(part.layout.num_prefix_tokens is not None for part in parts):
        handles.append(model.register_forward_pre_hook(partial(_check_shape, places.image_size)))
    return Insertion(inserted, handles, hosts)


def optimizer_for(
    model: nn.Module, make: Callable[[Any], torch.optim.Optimizer], *, gamma_lr_factor: float = 10.0
) -> torch.optim.Optimizer:
    """Make an optimizer in which the γ of inserted mechanisms have their own learning rate and no weight decay.

    All γ are in one parameter group with an `lr_factor`. During each step, and only then, the group's `lr` is
    multiplied by this factor, so schedulers can set `lr` as usual.

    Args:
        model: the network. Without inserted γ, the optimizer has a single group.
        make: makes the optimizer from parameters or parameter groups.
        gamma_lr_factor: factor on the learning rate of γ, > 0 (default: 10). A small network with CBAM after its blocks
            was trained on noisy digits with the factors 1, 10 and 100 (114 steps of AdamW at 5e-4, two seeds): |γ|
            reached .05, .42 and 1.6, and the accuracy .966, .968 and .961.

    Raises:
        ValueError: gamma_lr_factor is not > 0.
    """
    if gamma_lr_factor <= 0:
        raise ValueError(f"gamma_lr_factor must be > 0, got {gamma_lr_factor}")
    gammas = [part.gamma for part in model.modules() if isinstance(part, Inserted) and part.gamma is not None]
    if not gammas:
        return make(model.parameters())
    known = set(gammas)
    rest = [parameter for parameter in model.parameters() if parameter not in known]
    optimizer = make([{"params": rest}, {"params": gammas, "weight_decay": 0.0, "lr_factor": gamma_lr_factor}])
    optimizer.register_step_pre_hook(partial(_scale, 1))
    optimizer.register_step_post_hook(partial(_scale, -1))
    return optimizer


def _names(places: Places, at: str | Sequence[str]) -> list[str]:
    if not isinstance(at, str) or at not in ("stages", "blocks", "branches"):
        return places.matching([at] if isinstance(at, str) else at)
    names = {"stages": places.stages, "blocks": places.blocks, "branches": places.branches}[at]()
    if not names:
        others = [kind for kind in ("stages", "blocks", "branches") if kind != at and getattr(places, kind)()]
        choices = " or ".join([*(f"at={kind!r}" for kind in others), "names of modules"])
        raise UsageError(f"no {at} can be found in this {places.kind}; use {choices}")
    return names


def _make(mechanism: Callable[[int], nn.Module], name: str, places: Places, preserve: bool) -> Inserted:
    layout = places.layout(name)
    where = f"{name} of this {places.kind}, {layout.channels} channels on {layout.grid[0]}×{layout.grid[1]}"
    output = places.output(name)
    try:
        part = Inserted(mechanism(layout.channels), layout, preserve=preserve).to(output.device, output.dtype)
        with torch.no_grad():
            attended = part.eval().mechanism(layout.to_maps(output))
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise UsageError(f"no mechanism can be made for {where}: {error}") from error
    if attended.shape != layout.to_maps(output).shape:
        raise UsageError(f"a mechanism must keep the shape; {type(part.mechanism).__name__} did not at {where}")
    return part


def fill_missing(
    prefixes: tuple[str, ...], model: nn.Module, state_dict: dict[str, object], prefix: str, *_: object
) -> None:
    """Add the inserted parts' current values to a state dict that has none of them, so that it loads strictly."""
    inserted = tuple(prefix + name for name in prefixes)
    if not any(key.startswith(inserted) for key in state_dict):
        own = model.state_dict(prefix=prefix)
        state_dict.update({key: value for key, value in own.items() if key.startswith(inserted)})


def _check_shape(shape: tuple[int, int], model: nn.Module, args: tuple[object, ...]) -> None:
    """Raise if the images' aspect ratio differs from the example's, since their tokens would form another grid."""
    if args and isinstance(args[0], Tensor) and args[0].ndim == 4:
        height, width = args[0].shape[2:]
        if height * shape[1] != width * shape[0]:
            raise UsageError(
                f"attention was inserted for images with the aspect ratio of {shape[0]}×{shape[1]}, but this batch has "
                f"{height}×{width}; insert it again with image= an example of your images"
            )


def _scale(sign: int, optimizer: torch.optim.Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_factor", 1.0) ** sign
