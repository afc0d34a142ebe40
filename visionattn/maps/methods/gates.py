"""Heatmaps of gates over positions.

Shapes: B batch, C channels, h × w the gate's grid.
"""

from torch import Tensor, nn

from visionattn.capture import NoWeights, Record, Records, Survey, capture, on_grid, run, survey_images
from visionattn.errors import UsageError, nearest
from visionattn.maps.method import Explanation, Method, Target, fitting


class Gate(Method):
    """The weights of a spatial gate (CBAM: Woo et al. 2018, 1807.06521, fig. 3; BAM and others).

    For networks with gates over positions. A gate with channels, (B, C, h, w), is averaged over its channels. If one
    mechanism has two gates, one along rows and one along columns, the map is their product. A channel gate has no
    heatmap, since its weights are the same at all positions.

    Args:
        layer: name of the gate, or of a module around it (default: the last spatial gate).
    """

    name = "gate"
    needs = "gates over positions"
    cost = "a forward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return any(survey.gates.values())

    def __init__(self, layer: str | None = None) -> None:
        self.layer = layer

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        with capture(model, NoWeights(), strict=True) as records:
            output = run(model, images_BCHW)
            if not records:
                raise UsageError(
                    f"gate needs gates over positions; this {type(model).__name__} has none."
                    f"{fitting(survey_images(model, images_BCHW))}"
                )
        spatial = spatial_gates(records)
        if not spatial:
            others = "attention" if records.attention else "glimpses"
            has = "gates over channels only" if records.gates else f"{others} and no gates"
            raise UsageError(
                f"gate needs gates over positions; this {type(model).__name__} has {has}."
                f"{fitting(survey_images(model, images_BCHW))}"
            )
        name = spatial[-1].name
        if self.layer is not None:
            names = [record.name for record in spatial]
            inside = [n for n in names if n == self.layer or n.startswith(f"{self.layer}.")]
            if not inside:
                raise UsageError(f"there is no spatial gate in {self.layer!r}.{nearest(self.layer, names)}")
            name = inside[-1]
        raw_Bhw = on_grid([record for record in spatial if record.name == name])
        return Explanation(raw_Bhw, output, None, f"gate of {name.rpartition('.')[0] or name}")


def spatial_gates(records: Records) -> list[Record]:
    """Return the records of gates over more than one position, in order."""
    return [r for r in records.gates if r.kind == "spatial_gate" and r.grid != (1, 1)]
