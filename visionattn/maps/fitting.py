"""Which methods fit a model, told by what a survey finds in it."""

from torch import Tensor, nn

from visionattn.capture.running import look
from visionattn.capture.survey import Survey


def names_that_fit(found: Survey) -> list[str]:
    """Names of the methods that fit, the plainest first."""
    names = ["gaze"] if found.glimpses else []
    sites = found.attention
    if sites:
        names.append("raw")
        if sites[-1].class_query is not None and not sites[-1].windowed and not sites[-1].context:
            names.append("dino")
        names += ["rollout", "grad_attention", "chefer", "grad_rollout"]
        if sites[-1].fused:
            names.append("value_norm")
    if any(found.gates.values()):
        names.append("gate")
    if any(activation.tokens.grid != (1, 1) for activation in found.activations):
        names += ["gradcam", "gradcam++", "layercam", "eigencam", "scorecam"]
    return names


def fitting(model: nn.Module, images_BCHW: Tensor) -> str:
    """Name the methods that fit a model, as the end of an error message."""
    return fitting_survey(look(model, images_BCHW))


def fitting_survey(found: Survey) -> str:
    """The same, of a model that was surveyed."""
    names = names_that_fit(found)
    return f" Methods that fit: {', '.join(names)}." if names else " No method fits."
