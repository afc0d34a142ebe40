"""Small models of transformers, saved into folders as the hub has them."""

import json
import string

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

VIT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def vit(folder, *, classes=3, processor=True, kind="ViTForImageClassification", **changes):
    """Save a ViT of 32 × 32 pixels with random weights, and return it."""
    torch.manual_seed(0)
    names = {index: f"kind {index}" for index in range(classes)}
    config = transformers.ViTConfig(
        **{**VIT, **changes}, id2label=names, label2id={name: k for k, name in names.items()}
    )
    model = getattr(transformers, kind)(config).eval()
    model.save_pretrained(folder)
    if processor:
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def zero_shot(folder, kind):
    """Save a small `clip` or `siglip` with a tokenizer of letters, and return the whole model and the tokenizer."""
    torch.manual_seed(0)
    words = ["<pad>", "<end>", *string.ascii_lowercase, " "]
    text = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "vocab_size": len(words), "max_position_embeddings": 20, "eos_token_id": 1, "pad_token_id": 0,
        "bos_token_id": 0, "projection_dim": 12,
    }  # fmt: skip
    vision = {**VIT, "hidden_size": 16, "num_attention_heads": 2}
    if kind == "siglip":
        text["projection_size"] = 16
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        model = transformers.SiglipModel(config)
        processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    else:
        config = transformers.CLIPConfig(
            text_config=text, vision_config={**vision, "projection_dim": 12}, projection_dim=12
        )
        model = transformers.CLIPModel(config)
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    letters = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.post_processor = processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<end>")
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def change_config(folder, **changes):
    """Change fields of a saved configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
