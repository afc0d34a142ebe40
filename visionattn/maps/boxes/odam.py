"""ODAM: the gradient of a box's score times the activation.

Shapes: B batch, N boxes of an image, C channels, H × W the input, h × w a map.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.errors import UsageError, nearest
from visionattn.maps.boxes.box_method import BoxMethod, best_boxes, detect


class ODAM(BoxMethod):
    """ODAM, the gradient of a box's score times the activation (Zhao & Chan 2023, 2304.06354).

        relu(Σ_c ∂score/∂A_c · A_c)

    For any detector. The map of each level of a feature pyramid is resampled to the finest level with its sum
    unchanged, and the maps are added. If the image's size is not a multiple of a level's stride, the level extends
    beyond the image; the strides are read from the pyramid's attribute `strides`. Deviations from the paper: the
    gradient is not smoothed, and only the class score is explained, not the box's edges.

    Args:
        layer: name of a module that returns one map (B, C, h, w), or a list, tuple or dict of maps, and runs once in a
            forward pass (default: the first module that returns a list, tuple or dict of maps: the pyramid, or the
            backbone).
    """

    name = "odam"

    def __init__(self, layer: str | None = None) -> None:
        self.layer = layer

    def explain(
        self, model: nn.Module, images_BCHW: Tensor, max_boxes: int, min_score: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], str]:
        name = self.layer or _first_with_maps(model, images_BCHW)
        names = dict(model.named_modules())
        if name not in names:
            raise UsageError(f"the detector has no layer {name!r}.{nearest(name, [n for n in names if n])}")
        with torch.enable_grad(), _cut(names[name], name) as leaves:
            detections = [best_boxes(detected, max_boxes, min_score) for detected in detect(model, images_BCHW)]
        if not leaves:
            raise UsageError(f"the layer {name!r} did not run; name a layer that runs")
        size = max((leaf.shape[2], leaf.shape[3]) for leaf in leaves)
        image_cells = _cells(names[name], leaves, (images_BCHW.shape[2], images_BCHW.shape[3]))
        raws = [leaves[0].new_zeros(len(detected["scores"]), *size, dtype=torch.float32) for detected in detections]
        for rank in range(max((len(raw) for raw in raws), default=0)):
            with torch.enable_grad():
                scores = [detected["scores"][rank] for detected in detections if len(detected["scores"]) > rank]
                score = torch.stack(scores).sum()
            if not score.requires_grad:
                raise UsageError(
                    f"no gradient of a score reaches {name}, since the detector computes without gradients; "
                    "name a later layer"
                )
            gradients = torch.autograd.grad(score, leaves, retain_graph=True, allow_unused=True)
            for leaf, gradient, cells in zip(leaves, gradients, image_cells, strict=True):
                if gradient is None:
                    continue
                share = cells[0] * cells[1] / (size[0] * size[1])
                fine_Bhw = _enlarged((gradient * leaf).sum(1).relu().float(), size, cells)
                for raw_Nhw, fine_hw in zip(raws, fine_Bhw, strict=True):
                    if len(raw_Nhw) > rank:
                        raw_Nhw[rank] += share * fine_hw.detach()
        return detections, raws, f"score by {name or 'the input'}"


@contextlib.contextmanager
def _cut(module: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Turn the maps that a module returns into leaves of the graph, and yield the list of leaves."""
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: object, out: object) -> object:
        maps = list(_maps(out))
        if not maps:
            raise UsageError(f"{name!r} returns no maps (B, C, h, w); name a layer that does")
        if leaves:
            raise UsageError(f"{name!r} runs more than once in a forward pass; name a layer that runs once")
        leaves.extend(x.detach().requires_grad_() for x in maps)
        after = iter(leaves)
        return _replaced(out, after)

    handle = module.register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


def _cells(module: nn.Module, leaves: Sequence[Tensor], size: tuple[int, int]) -> list[tuple[float, float]]:
    """Return how many rows and columns of each map the image covers; these may be fractions."""
    strides = getattr(module, "strides", ())
    if len(strides) != len(leaves):
        return [(leaf.shape[2], leaf.shape[3]) for leaf in leaves]
    return [(size[0] / stride, size[1] / stride) for stride in strides]


def _enlarged(map_Bhw: Tensor, size: tuple[int, int], cells: tuple[float, float]) -> Tensor:
    """Resample the first `cells` rows and columns of a map to another size, bilinearly between centres of cells."""
    ratio_y, ratio_x = cells[0] / map_Bhw.shape[1], cells[1] / map_Bhw.shape[2]
    to_map = map_Bhw.new_tensor([[ratio_x, 0, ratio_x - 1], [0, ratio_y, ratio_y - 1]]).expand(len(map_Bhw), 2, 3)
    grid = F.affine_grid(to_map, [len(map_Bhw), 1, *size], align_corners=False)
    return F.grid_sample(map_Bhw[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


def _maps(out: object) -> Sequence[Tensor]:
    """Return the maps (B, C, h, w) in a module's output; an empty list if the output holds anything else.

    Of an output with `feature_maps`, as backbones of transformers return it, only these are considered.
    """
    if isinstance(out, dict):
        out = out.get("feature_maps", out)
    values = list(out.values()) if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else [out]
    maps = [value for value in values if isinstance(value, Tensor) and value.ndim == 4]
    return maps if len(maps) == len(values) else []


def _replaced(out: object, leaves: Iterator[Tensor]) -> object:
    """Return a module's output with a clone of a leaf in place of each map."""
    # clones, since a later in-place activation would fail on a leaf, or change it
    if isinstance(out, dict) and "feature_maps" in out:
        return type(out)(**{**out, "feature_maps": tuple(x.clone() for x in leaves)})
    if isinstance(out, dict):
        return type(out)((key, next(leaves).clone()) for key in out)
    return type(out)(x.clone() for x in leaves) if isinstance(out, (list, tuple)) else next(leaves).clone()


def _first_with_maps(model: nn.Module, images_BCHW: Tensor) -> str:
    """Return the name of the first module, from the outermost inwards, that returns a list, tuple or dict of maps."""
    several: set[nn.Module] = set()

    def note(module: nn.Module, _: object, out: object) -> None:
        if isinstance(out, (list, tuple, dict)) and len(_maps(out)):
            several.add(module)

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        detect(model, images_BCHW[:1])
    finally:
        for handle in handles:
            handle.remove()
    for name, module in model.named_modules():
        if module in several:
            return name
    raise UsageError(f"no part of this {type(model).__name__} returns a list of maps; name the layer to explain")
