"""Small models with attention far from uniform, attention computed by hand, and the state that captures must keep."""

import copy
import functools
import math

import timm
import torch
import torch.nn.functional as F
import torchvision

from visionattn.capture import capture


def randomised(model, seed=0):
    """Give every weight matrix random values large enough that attention differs between positions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                gain = 2.0 if "qkv" in name or "in_proj" in name or "query" in name or "key" in name else 1.0
                spread = gain / parameter[0].numel() ** 0.5 if parameter.shape[0] > 1 or parameter.ndim == 4 else 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            elif not parameter.any():  # branches that timm starts at zero
                parameter.fill_(1)
    return model.eval()


def made_once(make):
    """Cache the models that a function makes, by its arguments; every call returns a copy."""
    cache = {}

    @functools.wraps(make)
    def copies(*names, **options):
        key = repr((names, options))
        if key not in cache:
            cache[key] = make(*names, **options)
        return copy.deepcopy(cache[key])

    return copies


@made_once
def vit(**options):
    """Three blocks of three heads, 4 × 4 patches."""
    options = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 7} | options
    return randomised(timm.create_model(options.pop("name", "vit_tiny_patch16_224"), **options))


@made_once
def torchvision_vit():
    return randomised(torchvision.models.VisionTransformer(64, 16, 2, 3, 48, 96, num_classes=7))


@made_once
def swin(**options):
    """Windows of 4 × 4 on a grid of 8 × 8, shifted by two in every second block."""
    options = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 24, "depths": (2, 2)} | options
    options = {"num_heads": (2, 4), "num_classes": 7} | options
    return randomised(timm.create_model("swin_tiny_patch4_window7_224", **options))


@made_once
def resnet(name="resnet10t", **options):
    """A narrow network of timm, its normalisation fitted to random pictures so that nothing saturates."""
    if name != "legacy_seresnet18":
        options = {"channels": (8, 16, 32, 32)} | options
    model = randomised(timm.create_model(name, num_classes=7, **options))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(pictures(batch=4))
    return model.eval()


FAMILIES = {
    "vit": (vit, 64),
    "torchvision vit": (torchvision_vit, 64),
    "swin": (swin, 32),
    "resnet with gates": (lambda: resnet("seresnet18"), 64),
}


def pictures(size=64, batch=2, seed=1, dtype=torch.float32):
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unfused(model, images):
    """Return a timm ViT's attention (B, heads, N, N) of every block, by timm's own unfused path, and its output."""
    model, seen = copy.deepcopy(model), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    return seen, model(images)


def with_gradients(model, images, score):
    """Return (A, ∂y/∂A) of every block in float64, where A is the attention from `unfused` and y = score(output)."""
    seen, output = unfused(model, images)
    gradients = torch.autograd.grad(score(output).sum(), seen)
    return [(a.detach().double(), g.double()) for a, g in zip(seen, gradients, strict=True)]


def softmax_by_hand(query, key, *, bias=None, scale=None, causal=False):
    """Compute softmax(q kᵀ · scale + bias) one query at a time: (B, H, Q, D), (B, G, K, D) → (B, H, Q, K)."""
    batch, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    out = torch.zeros(batch, heads, queries, key.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                logits = [
                    float((query[b, h, i].double() * key[b, h // groups, j].double()).sum())
                    * (width**-0.5 if scale is None else scale)
                    for j in range(key.shape[2])
                ]
                for j in range(key.shape[2]):
                    if bias is not None:
                        logits[j] += float(bias[b, h, i, j])
                    if causal and j > i:
                        logits[j] = -math.inf
                top = max(logits)
                exps = [math.exp(logit - top) for logit in logits]
                out[b, h, i] = torch.tensor([e / sum(exps) for e in exps], dtype=torch.float64)
    return out


def kept(model, images, keep, **options):
    """Return the records of attention of one call without gradients."""
    with torch.no_grad(), capture(model, keep, **options) as records:
        model(images)
    return records.attention


def cells_of_windows(size, window, shift):
    """Return the cell of each token of each window: roll the image of cell numbers, and cut it into windows."""
    windows = []
    for top in range(0, size, window):
        for left in range(0, size, window):
            windows.append(
                [
                    ((top + i + shift) % size) * size + (left + j + shift) % size
                    for i in range(window)
                    for j in range(window)
                ]
            )
    return windows


def state_of(model):
    """Return all state of the model and of torch that a capture could change."""
    hooks = [
        (name, kind, len(getattr(module, kind)))
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    ]
    return {
        "hooks": hooks,
        "training": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "parameters": [p.detach().clone() for p in model.parameters()],
        "buffers": [b.clone() for b in model.buffers()],
        "names": sorted(vars(model)),
        "functions": (F.scaled_dot_product_attention, F.softmax, F.multi_head_attention_forward, torch.softmax),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "modes": torch._C._len_torch_function_stack(),
        "random": torch.get_rng_state(),
    }


def assert_same_state(before, after):
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key in ("parameters", "buffers", "grad"):
            pairs = zip(value, after[key], strict=True)
            assert all((a is b is None) or torch.equal(a, b) for a, b in pairs), key
        elif key == "random":
            assert torch.equal(value, after[key])
        else:
            assert value == after[key], key


class BrokenError(Exception):
    pass
