"""From files to batches: decoding, placement, augmentation, data sets."""

from typing import TYPE_CHECKING

from visionattn._lazy import lazy

if TYPE_CHECKING:
    from visionattn.data.canvas import DigitsOnCanvas as DigitsOnCanvas
    from visionattn.data.canvas import DigitsOnCanvasData as DigitsOnCanvasData
    from visionattn.data.datamodules import ClassificationData as ClassificationData
    from visionattn.data.datamodules import ClutteredDigitsData as ClutteredDigitsData
    from visionattn.data.datamodules import ImageFolderData as ImageFolderData
    from visionattn.data.datamodules import TorchvisionData as TorchvisionData
    from visionattn.data.decode import read_image as read_image
    from visionattn.data.decode import write_animation as write_animation
    from visionattn.data.decode import write_image as write_image
    from visionattn.data.detection import AnnotatedData as AnnotatedData
    from visionattn.data.detection import DetectionData as DetectionData
    from visionattn.data.detection import DigitScenesData as DigitScenesData
    from visionattn.data.digit_scenes import DigitScenes as DigitScenes
    from visionattn.data.digits import ClutteredDigits as ClutteredDigits
    from visionattn.data.folder import ImageFolder as ImageFolder
    from visionattn.data.loading import ImageData as ImageData
    from visionattn.data.placement import Placement as Placement
    from visionattn.data.placement import Preprocess as Preprocess
    from visionattn.data.shards import ShardData as ShardData
    from visionattn.data.transforms import Augmentation as Augmentation

__getattr__, __dir__ = lazy(
    __name__,
    {
        "canvas": ("DigitsOnCanvas", "DigitsOnCanvasData"),
        "datamodules": ("ClassificationData", "ClutteredDigitsData", "ImageFolderData", "TorchvisionData"),
        "decode": ("read_image", "write_animation", "write_image"),
        "detection": ("AnnotatedData", "DetectionData", "DigitScenesData"),
        "digit_scenes": ("DigitScenes",),
        "digits": ("ClutteredDigits",),
        "folder": ("ImageFolder",),
        "loading": ("ImageData",),
        "placement": ("Placement", "Preprocess"),
        "shards": ("ShardData",),
        "transforms": ("Augmentation",),
    },
)
