"""Mechanisms: modules that compute attention weights and apply them."""

from typing import TYPE_CHECKING

from visionattn._lazy import lazy

if TYPE_CHECKING:
    from visionattn.attention.channel import ECA as ECA
    from visionattn.attention.channel import SE as SE
    from visionattn.attention.channel import FcaNet as FcaNet
    from visionattn.attention.coordinate import CoordinateAttention as CoordinateAttention
    from visionattn.attention.joint import CBAM as CBAM
    from visionattn.attention.joint import SimAM as SimAM
    from visionattn.attention.joint import TripletAttention as TripletAttention

__getattr__, __dir__ = lazy(
    __name__,
    {
        "channel": ("SE", "ECA", "FcaNet"),
        "coordinate": ("CoordinateAttention",),
        "joint": ("CBAM", "SimAM", "TripletAttention"),
    },
)
