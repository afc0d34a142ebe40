"""Write COVERAGE.md, the table of models whose attention `capture` records:

    python -m tests.capture.coverage

The table has one small model of every timm family with attention, with fewer channels and blocks where possible, and
models of torchvision and transformers. The weights are random, since the positions of tokens do not depend on them.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torchvision

from visionattn.capture import FullAttention, capture
from visionattn.errors import UsageError

TABLE = Path(__file__).with_name("COVERAGE.md")

MEMBERS = {  # timm family: model, image size if not the default, and options that make it smaller
    "beit": ("beit_base_patch16_224", None, {"depth": 2}),
    "byoanet": ("halonet_h1", None, {}),
    "byobnet": ("gcresnet33ts", 128, {}),
    "cait": ("cait_xxs24_224", None, {}),
    "coat": ("coat_tiny", None, {}),
    "convit": ("convit_tiny", None, {}),
    "cpubone": ("cpubone_nano", None, {}),
    "crossvit": ("crossvit_tiny_240", None, {}),
    "csatv2": ("csatv2", 256, {}),
    "cspnet": ("sedarknet21", 128, {}),
    "cspnext": ("cspnext_tiny", 128, {}),
    "davit": ("davit_tiny", None, {}),
    "deepseek_vit": ("deepseek_vit_412m", 112, {"img_size": 112, "depth": 2, "embed_dim": 192, "num_heads": 3}),
    "deit": ("deit_tiny_distilled_patch16_224", None, {}),
    "edgenext": ("edgenext_xx_small", None, {}),
    "efficientformer": ("efficientformer_l1", None, {}),
    "efficientformer_v2": ("efficientformerv2_s0", None, {}),
    "efficientnet": ("mnasnet_small", 128, {}),
    "efficientvim": ("efficientvim_m1", None, {}),
    "efficientvit_mit": ("efficientvit_b0", None, {}),
    "efficientvit_msra": ("efficientvit_m0", None, {}),
    "eva": ("eva02_tiny_patch14_224", None, {}),
    "fastvit": ("fastvit_mci0", None, {}),
    "gcvit": ("gcvit_xxtiny", None, {}),
    "gemma4_vit": ("gemma4_vit_167m", 96, {"img_size": 96, "depth": 2}),
    "ghostnet": ("ghostnet_050", 128, {}),
    "hardcorenas": ("hardcorenas_b", 128, {}),
    "hgnet": ("hgnet_tiny", 128, {}),
    "hiera": ("hiera_tiny_224", None, {}),
    "hieradet_sam2": ("sam2_hiera_tiny", 256, {}),
    "iformer": ("iformer_t", None, {}),
    "lcnetv2": ("lcnetv2_small", 128, {}),
    "levit": ("levit_128s", None, {}),
    "lowformer": ("lowformer_b0", None, {}),
    "maxxvit": ("maxvit_tiny_tf_224", None, {}),
    "metaformer": ("caformer_s18", None, {}),
    "mobilenetv3": ("mobilenetv4_hybrid_medium_075", None, {}),
    "mobilenetv5": ("mobilenetv5_base", 128, {}),
    "mobilevit": ("mobilevit_xxs", None, {}),
    "mvitv2": ("mvitv2_tiny", None, {}),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", 96, {"depth": 2, "embed_dim": 192, "num_heads": 3}),
    "nest": ("nest_tiny", None, {}),
    "nextvit": ("nextvit_small", None, {}),
    "nfnet": ("test_nfnet", None, {}),
    "pit": ("pit_ti_224", None, {}),
    "pvt_v2": ("pvt_v2_b0", None, {}),
    "qwen3_vit": ("qwen3_vit_88m", 96, {"img_size": 96, "depth": 2}),
    "rdnet": ("rdnet_tiny", 128, {}),
    "regnet": ("regnety_002", 128, {}),
    "repghost": ("repghostnet_050", 128, {}),
    "repvit": ("repvit_m1", 128, {}),
    "resnest": ("resnest14d", 128, {}),
    "resnet": ("seresnet18", 128, {}),
    "rexnet": ("rexnet_100", 128, {}),
    "senet": ("legacy_seresnet18", 128, {}),
    "shvit": ("shvit_s1", None, {}),
    "sknet": ("skresnet18", 128, {}),
    "swiftformer": ("swiftformer_xs", None, {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", None, {}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", None, {}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", None, {}),
    "tiny_vit": ("tiny_vit_5m_224", None, {}),
    "tnt": ("tnt_s_legacy_patch16_224", None, {}),
    "tresnet": ("tresnet_m", 128, {}),
    "twins": ("twins_svt_small", None, {}),
    "visformer": ("visformer_tiny", None, {}),
    "vision_transformer": ("test_vit", None, {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", None, {}),
    "vision_transformer_relpos": ("test_vit_relpos", None, {}),
    "vision_transformer_sam": ("samvit_base_patch16_224", None, {"depth": 3, "embed_dim": 192, "num_heads": 3}),
    "vitamin": ("vitamin_small_224", None, {}),
    "volo": ("volo_d1_224", None, {}),
    "vovnet": ("ese_vovnet19b_slim_dw", 128, {}),
    "xcit": ("xcit_nano_12_p16_224", None, {}),
}
NOT_ATTENDING = frozenset(  # families in which no model has gates, or attention over positions, channels or branches
    [
        "convmixer",
        "convnext",
        "densenet",
        "dla",
        "dpn",
        "fasternet",
        "focalnet",
        "hrnet",
        "inception_next",
        "inception_resnet_v2",
        "inception_v3",
        "inception_v4",
        "mambaout",
        "mlp_mixer",
        "nasnet",
        "pnasnet",
        "res2net",
        "resnetv2",
        "selecsls",
        "sequencer",
        "starnet",
        "vgg",
        "xception",
        "xception_aligned",
    ]
)


class Row(NamedTuple):
    """A row of the table."""

    family: str
    member: str
    attention: int
    gates: int
    grids: str
    error: float  # largest deviation of a row's sum from one
    same: bool  # whether the outputs with and without a capture are equal, bit for bit
    reason: str  # why something is not recorded

    @property
    def covered(self) -> bool:
        return self.same and (self.attention > 0 or self.gates > 0) and self.error <= 1e-4


def _hugging_face(implementation: str) -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=64)
    config._attn_implementation = implementation
    return ViTForImageClassification(config)


OTHERS: dict[str, tuple[Callable[[], torch.nn.Module], int]] = {
    "torchvision ViT": (lambda: torchvision.models.VisionTransformer(64, 16, 2, 3, 48, 96), 64),
    "torchvision Swin": (torchvision.models.swin_t, 224),
    "torchvision Swin v2": (torchvision.models.swin_v2_t, 256),
    "torchvision MaxViT": (torchvision.models.maxvit_t, 224),
    "torchvision MobileNetV3": (torchvision.models.mobilenet_v3_small, 128),
    "transformers ViT, fused": (lambda: _hugging_face("sdpa"), 64),
    "transformers ViT, eager": (lambda: _hugging_face("eager"), 64),
}


def capture_family(family: str) -> Row:
    """Capture the model of a timm family."""
    member, size, options = MEMBERS[family]
    model = timm.create_model(member, **options)
    return capture_model(family, member, model, size or model.default_cfg["input_size"][-1])


def capture_other(title: str) -> Row:
    """Capture a model of another library."""
    make, size = OTHERS[title]
    model = make()
    return capture_model(title, type(model).__name__, model, size)


def capture_model(family: str, member: str, model: torch.nn.Module, size: int) -> Row:
    """Capture all weights of a model on two random images."""
    model.eval()
    torch.manual_seed(0)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(images)
        try:
            with capture(model, FullAttention()) as records:
                found = model(images)
        except UsageError as error:
            return Row(family, member, 0, 0, "", 0.0, True, str(error).partition(" (")[2].partition("); methods")[0])
    expected, found = (out if isinstance(out, torch.Tensor) else out.logits for out in (expected, found))
    error = max((float((r.weights.sum(-1) - 1).abs().max()) for r in records.attention), default=0.0)
    grids = list(dict.fromkeys("×".join(map(str, record.grid)) for record in records.attention))
    reasons = list(dict.fromkeys((records.unlabelled | records.other).values()))
    reasons += [f"{len(records.missed)} modules look like attention but did not attend"] if records.missed else []
    same = torch.equal(expected, found)
    return Row(
        family, member, len(records.attention), len(records.gates), ", ".join(grids), error, same, "; ".join(reasons)
    )


def table(rows: list[Row]) -> str:
    """Write the table as Markdown."""
    families = [row for row in rows if row.family in MEMBERS]
    covered = [row for row in families if row.covered]
    lines = [
        "# Models whose attention `capture` records",
        "",
        f"timm {timm.__version__}, torchvision {torchvision.__version__.partition('+')[0]}. Written by "
        "`python -m tests.capture.coverage`, whose source lists the options of the models.",
        "",
        f"**{len(covered)} of {len(families)} timm families that attend "
        f"({100 * len(covered) / len(families):.0f} %)** give records: attention whose rows "
        "sum to one, or gates. The last column gives the reason why something is not recorded. "
        "The outputs with and without a capture are equal, bit for bit.",
        "",
        "| family | model | attention | gates | grids | deviation of a row's sum from 1 | not recorded, because |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mark = "" if row.covered else "**not covered**: "
        error = f"{row.error:.0e}" if row.attention else ""
        cells = row.family, row.member, row.attention or "", row.gates or "", row.grids, error, mark + row.reason
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", f"Families without attention or gates: {', '.join(sorted(NOT_ATTENDING))}.", ""]
    return "\n".join(lines)


def main() -> None:
    rows = []
    for family in MEMBERS:
        rows.append(capture_family(family))
        print(rows[-1], flush=True)
    rows += [capture_other(title) for title in OTHERS]
    TABLE.write_text(table(rows))


if __name__ == "__main__":
    main()
