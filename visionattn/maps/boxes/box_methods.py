"""The methods for boxes by name, and the default method of a detector."""

from torch import nn

from visionattn.attention import DeformableAttention
from visionattn.maps.boxes.box_attention import BoxAttention
from visionattn.maps.boxes.box_method import BoxMethod
from visionattn.maps.boxes.drise import DRISE
from visionattn.maps.boxes.odam import ODAM
from visionattn.maps.boxes.query_sampling import QuerySampling

BOX_METHODS: dict[str, type[BoxMethod]] = {method.name: method for method in (ODAM, QuerySampling, BoxAttention, DRISE)}
"""Name on the command line → class."""


def default_box_method(detector: nn.Module) -> BoxMethod:
    """Choose the default method of a detector: `QuerySampling` if it has deformable attention, otherwise `ODAM`."""
    return QuerySampling() if any(isinstance(part, DeformableAttention) for part in detector.modules()) else ODAM()
