"""Mechanisms: modules that compute attention weights and apply them."""

from typing import TYPE_CHECKING

from visionattn._lazy import lazy

if TYPE_CHECKING:
    from visionattn.attention.channel import ECA as ECA
    from visionattn.attention.channel import SE as SE
    from visionattn.attention.insertion import insert as insert
    from visionattn.attention.insertion import optimizer_for as optimizer_for
    from visionattn.attention.joint import CBAM as CBAM

__getattr__, __dir__ = lazy(
    __name__, {"channel": ("SE", "ECA"), "insertion": ("insert", "optimizer_for"), "joint": ("CBAM",)}
)
