"""Networks made of mechanisms."""

from typing import TYPE_CHECKING

from visionattn._lazy import lazy

if TYPE_CHECKING:
    from visionattn.models.classifier import Classifier as Classifier
    from visionattn.models.convnet import ConvNet as ConvNet

__getattr__, __dir__ = lazy(__name__, {"classifier": ("Classifier",), "convnet": ("ConvNet",)})
