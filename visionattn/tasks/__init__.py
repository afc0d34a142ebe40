"""Training objectives, each a LightningModule."""

from typing import TYPE_CHECKING

from visionattn._lazy import lazy

if TYPE_CHECKING:
    from visionattn.tasks.classification import Classification as Classification
    from visionattn.tasks.detection import Detection as Detection
    from visionattn.tasks.glimpses import GlimpseClassification as GlimpseClassification

__getattr__, __dir__ = lazy(
    __name__,
    {
        "classification": ("Classification",),
        "detection": ("Detection",),
        "glimpses": ("GlimpseClassification",),
    },
)
