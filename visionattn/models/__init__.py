"""Networks made of mechanisms."""

from typing import TYPE_CHECKING

from visionattn._lazy import lazy

if TYPE_CHECKING:
    from visionattn.models.classifier import Classifier as Classifier
    from visionattn.models.convnet import ConvNet as ConvNet
    from visionattn.models.encoders import ConvEncoder as ConvEncoder
    from visionattn.models.encoders import Glance as Glance
    from visionattn.models.encoders import MLPEncoder as MLPEncoder
    from visionattn.models.encoders import TimmEncoder as TimmEncoder
    from visionattn.models.glimpse_network import GlimpseNetwork as GlimpseNetwork

__getattr__, __dir__ = lazy(
    __name__,
    {
        "classifier": ("Classifier",),
        "convnet": ("ConvNet",),
        "encoders": ("ConvEncoder", "Glance", "MLPEncoder", "TimmEncoder"),
        "glimpse_network": ("GlimpseNetwork",),
    },
)
