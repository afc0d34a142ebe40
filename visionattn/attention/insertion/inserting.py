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
from visionattn.errors import UsageError

_CHILD = "inserted"


class Inserted(nn.Module):
    """A mechanism at an insertion point, by default with a gate γ that starts closed.

        out = x + γ (mechanism(x) − x),    γ = 0 at first

    With γ = 0 the network computes what it did before (−0 may become 0), and training opens γ as far as the mechanism
    helps. ReZero opens residual branches in this way (Bachlechner et al. 2021, 2003.04887, eq. 3); here the mechanism
    replaces the branch, and x keeps its weight 1 − γ. γ is one number per insertion point; γ = 1 is the paper's form.

    Args:
        mechanism: (B, C, h, w) → the same.
        layout: how the module's output stores the feature map.
        preserve: True (default) uses γ; False gives out = mechanism(x), the paper's form.

    Shape: as `layout` → the same; prefix tokens pass unchanged.
    """

    def __init__(self, mechanism: nn.Module, layout: Layout, *, preserve: bool = True) -> None:
        super().__init__()
        self.mechanism = mechanism
        self.layout = layout
        # one axis, since fully sharded training accepts no scalar parameters
        self.gamma = nn.Parameter(torch.zeros(1)) if preserve else None

    def forward(self, x: Tensor) -> Tensor:
        maps_BChw = self.layout.to_maps(x)
        attended_BChw = self.mechanism(maps_BChw).to(x.dtype)  # under autocast a mechanism may change the dtype
        if self.gamma is not None:
            # lerp computes the difference in a wider type: in half precision it could overflow, and 0 · inf is NaN
            attended_BChw = torch.lerp(maps_BChw, attended_BChw, self.gamma.to(x.dtype))
        return self.layout.from_maps(attended_BChw, x)

    def after(self, module: nn.Module, args: object, output: Any) -> Any:
        """Apply the mechanism to the output of the module before it, as its forward hook."""
        if self.layout.item is None:
            return self(output)
        old = output[self.layout.item]
        new = self(old)
        return tuple(new if item is old else item for item in output)  # some networks return the tensor twice


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
        """Remove all mechanisms, which leaves the model as it was before `insert`. A second call has no effect."""
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

    By default the network's outputs do not change, and weights of the plain network still load strictly: a state dict
    may lack all keys of the inserted mechanisms, but no other keys. No module changes its name. A mechanism becomes the
    child `inserted` of the module that it follows (of the last item, if that module is a Sequential).

        >>> import timm, visionattn as va
        >>> model = timm.create_model("resnet18")
        >>> va.insert(model, va.attention.CBAM, at=["layer3", "layer4"])
        Insertion(layer3: CBAM, γ = 0; layer4: CBAM, γ = 0)

    Args:
        model: a network of timm, torchvision or your own, or a part of one.
        mechanism: makes a mechanism for maps (B, C, h, w) from C, e.g. `visionattn.attention.CBAM`. Channels-last maps
            and tokens are rearranged to (B, C, h, w) for it; class and register tokens pass unchanged.
        at: `"stages"` or `"blocks"`: after each of them (default: stages); `"branches"`: at the end of every residual
            branch, before the addition; or names of modules, in which * stands for one part of a name:
            `"layer4.*.bn3"`, `["layer3", "layer4"]`. Modules that do not affect the output are left out unless named.
        preserve: start with a closed gate γ, see `Inserted` (default); False gives the paper's form.
        image: (C, H, W), an example of the network's input (default: the size that the model is configured for). A
            network with tokens needs it if your images have another shape.

    Returns:
        The inserted mechanisms by place, with `remove()`.

    Raises:
        UsageError: there is no such place, the network does not run on the image, a mechanism is already inserted
            there, or the mechanism cannot be made for the channels there. The network is then unchanged.
    """
    places = Places(model, image, skip=Inserted)
    modules = dict(model.named_modules())
    inserted: dict[str, Inserted] = {}
    hosts: list[nn.Module] = []
    hooked: list[nn.Module] = []
    for name in _names(places, at):
        holder, place = places.holder(name)
        if hasattr(modules[holder], _CHILD) or modules[holder] in hosts:
            raise UsageError(
                f"{name} of this {places.kind} has a mechanism inserted already; remove() that first, or choose "
                "another place"
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

    The γ form a parameter group with an `lr_factor`. It multiplies the learning rate during each step only, so
    schedulers can set `lr` as usual.

    Args:
        model: with or without insertions; without, the optimizer has one group.
        make: makes the optimizer from parameters or parameter groups.
        gamma_lr_factor: > 0 (default: 10). It was measured once, with CBAM after the blocks of a small network trained
            on noisy digits (114 steps of AdamW at 5e-4, two seeds): |γ| reached .05 with factor 1, .42 with 10, and 1.6
            with 100; the accuracy was .966, .968 and .961.

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
        works = " or ".join([*(f"take at={kind!r}" for kind in others), "name modules of it"])
        raise UsageError(f"no {at} can be found in this {places.kind}; {works}")
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
    """Let weights of the plain network load: if a state dict lacks the inserted parts, add their current values."""
    inserted = tuple(prefix + name for name in prefixes)
    if not any(key.startswith(inserted) for key in state_dict):
        own = model.state_dict(prefix=prefix)
        state_dict.update({key: value for key, value in own.items() if key.startswith(inserted)})


def _check_shape(shape: tuple[int, int], model: nn.Module, args: tuple[object, ...]) -> None:
    """Raise if images have another aspect ratio than the example: their tokens would form another grid."""
    if args and isinstance(args[0], Tensor) and args[0].ndim == 4:
        height, width = args[0].shape[2:]
        if height * shape[1] != width * shape[0]:
            raise UsageError(
                f"attention was inserted for the tokens of images in the shape of {shape[0]}×{shape[1]}, and this one "
                f"has {height}×{width}; insert it with image= an example of that shape"
            )


def _scale(sign: int, optimizer: torch.optim.Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_factor", 1.0) ** sign
