"""Mechanisms: modules that compute attention weights and apply them."""

from typing import TYPE_CHECKING

from visionattn._lazy import lazy

if TYPE_CHECKING:
    from visionattn.attention.adaptive_span import AdaptiveSpan as AdaptiveSpan
    from visionattn.attention.adaptive_span import mean_span as mean_span
    from visionattn.attention.adaptive_span import spans as spans
    from visionattn.attention.block_sparse import BlockSparse as BlockSparse
    from visionattn.attention.branches import SelectiveKernel as SelectiveKernel
    from visionattn.attention.branches import SplitAttention as SplitAttention
    from visionattn.attention.channel import ECA as ECA
    from visionattn.attention.channel import GCT as GCT
    from visionattn.attention.channel import SE as SE
    from visionattn.attention.channel import CircularECA as CircularECA
    from visionattn.attention.channel import EffectiveSE as EffectiveSE
    from visionattn.attention.channel import FcaNet as FcaNet
    from visionattn.attention.channel import WideECA as WideECA
    from visionattn.attention.context import DoubleAttention as DoubleAttention
    from visionattn.attention.context import GlobalContext as GlobalContext
    from visionattn.attention.context import GlobalContextGate as GlobalContextGate
    from visionattn.attention.context import Lambda as Lambda
    from visionattn.attention.coordinate import ELA as ELA
    from visionattn.attention.coordinate import CoordinateAttention as CoordinateAttention
    from visionattn.attention.coordinate import SimpleCoordinateAttention as SimpleCoordinateAttention
    from visionattn.attention.coordinate import StripAttention as StripAttention
    from visionattn.attention.glimpse import Retina as Retina
    from visionattn.attention.insertion import insert as insert
    from visionattn.attention.insertion import optimizer_for as optimizer_for
    from visionattn.attention.joint import BAM as BAM
    from visionattn.attention.joint import CBAM as CBAM
    from visionattn.attention.joint import EMA as EMA
    from visionattn.attention.joint import LightCBAM as LightCBAM
    from visionattn.attention.joint import SimAM as SimAM
    from visionattn.attention.joint import TripletAttention as TripletAttention
    from visionattn.attention.neighbourhood import Neighbourhood as Neighbourhood
    from visionattn.attention.normalisers import Entmax15 as Entmax15
    from visionattn.attention.normalisers import NormalisedSigmoid as NormalisedSigmoid
    from visionattn.attention.normalisers import Softmax as Softmax
    from visionattn.attention.normalisers import Sparsemax as Sparsemax
    from visionattn.attention.normalisers import entmax15 as entmax15
    from visionattn.attention.normalisers import sparsemax as sparsemax
    from visionattn.attention.pairwise import BilinearAttention as BilinearAttention
    from visionattn.attention.pairwise import BottleneckAttention as BottleneckAttention
    from visionattn.attention.pairwise import DualAttention as DualAttention
    from visionattn.attention.pairwise import HaloAttention as HaloAttention
    from visionattn.attention.pairwise import NonLocal as NonLocal
    from visionattn.attention.policies import Categorical as Categorical
    from visionattn.attention.policies import Gaussian as Gaussian
    from visionattn.attention.policies import TanhGaussian as TanhGaussian
    from visionattn.attention.policies import TruncatedGaussian as TruncatedGaussian
    from visionattn.attention.pooling import AdditiveScore as AdditiveScore
    from visionattn.attention.pooling import AttentionHead as AttentionHead
    from visionattn.attention.pooling import AttentionPool as AttentionPool
    from visionattn.attention.pooling import BilinearScore as BilinearScore
    from visionattn.attention.pooling import CosineScore as CosineScore
    from visionattn.attention.pooling import DotScore as DotScore
    from visionattn.attention.pooling import GatedScore as GatedScore
    from visionattn.attention.pooling import ScaledDotScore as ScaledDotScore
    from visionattn.attention.self_attention import Dense as Dense
    from visionattn.attention.self_attention import PooledKeys as PooledKeys
    from visionattn.attention.self_attention import SelfAttention as SelfAttention
    from visionattn.attention.self_attention import TopK as TopK
    from visionattn.attention.self_attention import Windowed as Windowed
    from visionattn.attention.spatial import LSKA as LSKA
    from visionattn.attention.spatial import AttentionGate as AttentionGate
    from visionattn.attention.spatial import GatherExcite as GatherExcite
    from visionattn.attention.swap import swap_attention as swap_attention
    from visionattn.attention.tokens import TokenMerging as TokenMerging
    from visionattn.attention.tokens import TokenPruning as TokenPruning
    from visionattn.attention.tokens import TokenReduction as TokenReduction
    from visionattn.attention.tokens import reduce_tokens as reduce_tokens

__getattr__, __dir__ = lazy(
    __name__,
    {
        "adaptive_span": (
            "AdaptiveSpan",
            "mean_span",
            "spans",
        ),
        "block_sparse": ("BlockSparse",),
        "branches": (
            "SelectiveKernel",
            "SplitAttention",
        ),
        "channel": (
            "SE",
            "EffectiveSE",
            "ECA",
            "CircularECA",
            "WideECA",
            "GCT",
            "FcaNet",
        ),
        "context": (
            "GlobalContext",
            "GlobalContextGate",
            "DoubleAttention",
            "Lambda",
        ),
        "coordinate": (
            "CoordinateAttention",
            "SimpleCoordinateAttention",
            "ELA",
            "StripAttention",
        ),
        "glimpse": ("Retina",),
        "insertion": (
            "insert",
            "optimizer_for",
        ),
        "joint": (
            "CBAM",
            "LightCBAM",
            "BAM",
            "SimAM",
            "TripletAttention",
            "EMA",
        ),
        "neighbourhood": ("Neighbourhood",),
        "normalisers": (
            "Softmax",
            "Sparsemax",
            "Entmax15",
            "NormalisedSigmoid",
            "sparsemax",
            "entmax15",
        ),
        "pairwise": (
            "NonLocal",
            "DualAttention",
            "BottleneckAttention",
            "HaloAttention",
            "BilinearAttention",
        ),
        "policies": ("Categorical", "Gaussian", "TanhGaussian", "TruncatedGaussian"),
        "pooling": (
            "AttentionHead",
            "AttentionPool",
            "DotScore",
            "ScaledDotScore",
            "AdditiveScore",
            "BilinearScore",
            "CosineScore",
            "GatedScore",
        ),
        "self_attention": (
            "SelfAttention",
            "Dense",
            "Windowed",
            "PooledKeys",
            "TopK",
        ),
        "spatial": (
            "AttentionGate",
            "GatherExcite",
            "LSKA",
        ),
        "swap": ("swap_attention",),
        "tokens": (
            "TokenMerging",
            "TokenPruning",
            "TokenReduction",
            "reduce_tokens",
        ),
    },
)
