"""Small detectors of transformers with random weights."""

import torch
import transformers

IMAGES = 128
"""Side of the images in pixels."""

_SHAPE = {
    "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 12,
}  # fmt: skip


def _resnet(kind=transformers.ResNetConfig, last=1):
    stages = [f"stage{number}" for number in range(5 - last, 5)]
    return kind(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], layer_type="basic", out_features=stages
    )


def _rt_detr(kind):
    shape = {name: value for name, value in _SHAPE.items() if name != "encoder_layers"}
    return kind(
        **shape, backbone_config=_resnet(transformers.RTDetrResNetConfig, 3), encoder_in_channels=[12, 16, 20],
        encoder_hidden_dim=32, d_model=32, decoder_in_channels=[32, 32, 32], anchor_image_size=None, num_labels=5,
    )  # fmt: skip


CONFIGS = {
    "detr": lambda: transformers.DetrConfig(
        **_SHAPE, use_timm_backbone=False, backbone_config=_resnet(), d_model=32, num_labels=5
    ),
    "conditional_detr": lambda: transformers.ConditionalDetrConfig(
        **_SHAPE, use_timm_backbone=False, backbone_config=_resnet(), d_model=32, num_labels=5
    ),
    "deformable_detr": lambda: transformers.DeformableDetrConfig(
        **_SHAPE, use_timm_backbone=False, backbone_config=_resnet(last=3), d_model=32, num_labels=5
    ),
    "dab-detr": lambda: transformers.DabDetrConfig(
        **_SHAPE, use_timm_backbone=False, backbone_config=_resnet(), hidden_size=32, num_labels=5
    ),
    "rt_detr": lambda: _rt_detr(transformers.RTDetrConfig),
    "rt_detr_v2": lambda: _rt_detr(transformers.RTDetrV2Config),
    "yolos": lambda: transformers.YolosConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=[IMAGES, IMAGES],
        patch_size=16, num_detection_tokens=8, num_labels=5,
    ),
}  # fmt: skip
PROCESSORS = {
    "detr": "DetrImageProcessor", "conditional_detr": "ConditionalDetrImageProcessor", "yolos": "YolosImageProcessor",
    "deformable_detr": "DeformableDetrImageProcessor", "rt_detr": "RTDetrImageProcessor",
    "rt_detr_v2": "RTDetrImageProcessor", "dab-detr": "ConditionalDetrImageProcessor",
}  # fmt: skip


def make(kind):
    """Return a small `…ForObjectDetection` whose boxes and classes differ between queries and images."""
    torch.manual_seed(0)
    model = transformers.AutoModelForObjectDetection.from_config(CONFIGS[kind]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ("class" in name or "query" in name or "embed" in name):
                parameter.normal_(std=0.5)
    return model


def save(folder, kind):
    """Save the detector of `make` with class names and an image processor into a folder, and return it."""
    model = make(kind)
    model.config.id2label = {index: f"kind {index}" for index in range(5)}
    model.config.label2id = {f"kind {index}": index for index in range(5)}
    model.save_pretrained(folder)
    size = {"height": IMAGES, "width": IMAGES} if "rt" in kind else {"shortest_edge": IMAGES, "longest_edge": 160}
    getattr(transformers, PROCESSORS[kind])(size=size).save_pretrained(folder)
    return model


def pictures(count=2):
    return torch.randn(count, 3, IMAGES, IMAGES, generator=torch.Generator().manual_seed(0))
