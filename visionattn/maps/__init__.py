"""From any vision model and images to heatmaps."""

from typing import TYPE_CHECKING

from visionattn._lazy import lazy

if TYPE_CHECKING:
    from visionattn.maps.artefacts import Artefacts as Artefacts
    from visionattn.maps.artefacts import find_artefacts as find_artefacts
    from visionattn.maps.attention_methods import DinoHeads as DinoHeads
    from visionattn.maps.attention_methods import RawAttention as RawAttention
    from visionattn.maps.attention_methods import ValueNorm as ValueNorm
    from visionattn.maps.base import Maps as Maps
    from visionattn.maps.base import MapWarning as MapWarning
    from visionattn.maps.base import Method as Method
    from visionattn.maps.cam import EigenCAM as EigenCAM
    from visionattn.maps.cam import GradCAM as GradCAM
    from visionattn.maps.cam import GradCAMPlusPlus as GradCAMPlusPlus
    from visionattn.maps.cam import LayerCAM as LayerCAM
    from visionattn.maps.cam import ScoreCAM as ScoreCAM
    from visionattn.maps.choose import METHODS as METHODS
    from visionattn.maps.choose import default_method as default_method
    from visionattn.maps.choose import methods_that_fit as methods_that_fit
    from visionattn.maps.controls import CentreGaussian as CentreGaussian
    from visionattn.maps.controls import Edges as Edges
    from visionattn.maps.controls import RandomMap as RandomMap
    from visionattn.maps.faithfulness import Curve as Curve
    from visionattn.maps.faithfulness import deletion as deletion
    from visionattn.maps.faithfulness import insertion as insertion
    from visionattn.maps.gates import Gate as Gate
    from visionattn.maps.gaze import Gaze as Gaze
    from visionattn.maps.keep import ClassRow as ClassRow
    from visionattn.maps.keep import Full as Full
    from visionattn.maps.keep import HeadMean as HeadMean
    from visionattn.maps.keep import Keep as Keep
    from visionattn.maps.keep import Nothing as Nothing
    from visionattn.maps.keep import PatchRow as PatchRow
    from visionattn.maps.localisation import pointing as pointing
    from visionattn.maps.records import Record as Record
    from visionattn.maps.records import Records as Records
    from visionattn.maps.records import capture as capture
    from visionattn.maps.relevance import Chefer as Chefer
    from visionattn.maps.relevance import GradientAttention as GradientAttention
    from visionattn.maps.relevance import GradientRollout as GradientRollout
    from visionattn.maps.rollout import Rollout as Rollout
    from visionattn.maps.scoring import Scores as Scores
    from visionattn.maps.scoring import score as score

__getattr__, __dir__ = lazy(
    __name__,
    {
        "artefacts": (
            "Artefacts",
            "find_artefacts",
        ),
        "attention_methods": (
            "DinoHeads",
            "RawAttention",
            "ValueNorm",
        ),
        "base": (
            "Maps",
            "MapWarning",
            "Method",
        ),
        "cam": (
            "EigenCAM",
            "GradCAM",
            "GradCAMPlusPlus",
            "LayerCAM",
            "ScoreCAM",
        ),
        "choose": (
            "METHODS",
            "default_method",
            "methods_that_fit",
        ),
        "controls": (
            "CentreGaussian",
            "Edges",
            "RandomMap",
        ),
        "faithfulness": (
            "Curve",
            "deletion",
            "insertion",
        ),
        "gates": ("Gate",),
        "gaze": ("Gaze",),
        "keep": (
            "ClassRow",
            "Full",
            "HeadMean",
            "Keep",
            "Nothing",
            "PatchRow",
        ),
        "localisation": ("pointing",),
        "records": (
            "Record",
            "Records",
            "capture",
        ),
        "relevance": (
            "Chefer",
            "GradientAttention",
            "GradientRollout",
        ),
        "rollout": ("Rollout",),
        "scoring": (
            "Scores",
            "score",
        ),
    },
)
