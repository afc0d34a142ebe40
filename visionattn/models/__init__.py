"""Networks made of mechanisms."""

from typing import TYPE_CHECKING

from visionattn._lazy import lazy

if TYPE_CHECKING:
    from visionattn.models.classifier import Classifier as Classifier
    from visionattn.models.convnet import ConvNet as ConvNet
    from visionattn.models.dense import DenseDetector as DenseDetector
    from visionattn.models.detector import Detector as Detector
    from visionattn.models.encoders import ConvEncoder as ConvEncoder
    from visionattn.models.encoders import Glance as Glance
    from visionattn.models.encoders import MLPEncoder as MLPEncoder
    from visionattn.models.encoders import TimmEncoder as TimmEncoder
    from visionattn.models.glimpse_network import GlimpseNetwork as GlimpseNetwork
    from visionattn.models.pyramid import FeaturePyramid as FeaturePyramid
    from visionattn.models.query import QueryDetector as QueryDetector
    from visionattn.models.torchvision_detector import TorchvisionDetector as TorchvisionDetector

__getattr__, __dir__ = lazy(
    __name__,
    {
        "classifier": ("Classifier",),
        "convnet": ("ConvNet",),
        "dense": ("DenseDetector",),
        "detector": ("Detector",),
        "pyramid": ("FeaturePyramid",),
        "query": ("QueryDetector",),
        "torchvision_detector": ("TorchvisionDetector",),
        "encoders": ("ConvEncoder", "Glance", "MLPEncoder", "TimmEncoder"),
        "glimpse_network": ("GlimpseNetwork",),
    },
)
