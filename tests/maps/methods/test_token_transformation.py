"""Beyond Intuition and TokenTM match their equations in slow loops over the tokens of ViTs."""

import copy
import math

import pytest
import timm
import torch
import transformers
from timm.models import vision_transformer

from tests.capture import models
from tests.maps.methods.vits import VITS, assert_same_map, model_and_images, patches_on_grid, query_tokens
from visionattn.errors import UsageError
from visionattn.maps import BeyondIntuition, LeGrad, TokenTM


def parts_of(model, images):
    """Return attention, values and tokens of each block of a timm ViT, by its unfused path, and the output."""
    model = copy.deepcopy(model).double()
    blocks = [{} for _ in model.blocks]
    for block, part in zip(model.blocks, blocks, strict=True):
        block.attn.fused_attn = False

        def values(module, args, out, part=part, attn=block.attn):
            part["value"] = out.unflatten(2, (3, attn.num_heads, -1))[:, :, 2]

        def keep(name, part=part):
            return lambda module, args, *out: part.update({name: out[0] if out else args[0]})

        block.register_forward_pre_hook(keep("before"))
        block.norm2.register_forward_pre_hook(keep("middle"))
        block.register_forward_hook(keep("after"))
        block.attn.qkv.register_forward_hook(values)
        block.attn.attn_drop.register_forward_hook(keep("attention"))
        part["projection"] = block.attn.proj.weight.detach()
    return blocks, model(images.double())


def length(vector):
    return math.sqrt(sum(x**2 for x in vector.tolist()))


def cosine(a, b):
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)) / (length(a) * length(b))


def transformed(part, b):
    """Return W_O v of every token, without the bias."""
    return [part["projection"] @ value.flatten() for value in part["value"][b].detach()]


def slow_beyond_intuition(model, blocks, gradient, b, first, queries):
    count = blocks[0]["before"].shape[1]
    relevance = torch.eye(count, dtype=torch.float64)
    for part in blocks[first:]:
        after = transformed(part, b)
        ratios = [length(after[i]) / length(part["before"][b, i]) for i in range(count)]
        moved = torch.zeros(count, count, dtype=torch.float64)
        mean = part["attention"][b].detach().mean(0)
        for i in range(count):
            for j in range(count):
                moved[i, j] = float(mean[i, j]) * ratios[j]
        relevance = relevance + moved @ relevance
    product = gradient[b].clamp(min=0).mean(0) * relevance
    return patches_on_grid(model, product[queries].mean(0))


def gradient_along_attention(model, images, steps):
    """Return the mean gradient of the last attention while it is scaled from 0 to 1, by running the whole model."""
    blocks, output = parts_of(model, images)
    target = output.argmax(1)
    total = 0
    for scale in torch.linspace(0, 1, steps, dtype=torch.float64) if steps > 1 else [1.0]:
        scaled = copy.deepcopy(model).double()
        attention = (blocks[-1]["attention"].detach() * scale).requires_grad_()
        for block in scaled.blocks:
            block.attn.fused_attn = False
        scaled.blocks[-1].attn.attn_drop.register_forward_hook(lambda module, args, out, a=attention: a)
        score = scaled(images.double()).gather(1, target[:, None]).sum()
        total = total + torch.autograd.grad(score, attention)[0] / steps
    return total


def gradient_along_image(model, images, steps):
    target, total = parts_of(model, images)[1].argmax(1), 0
    for scale in torch.linspace(0, 1, steps, dtype=torch.float64):
        blocks, output = parts_of(model, images.double() * scale)
        score = output.gather(1, target[:, None]).sum()
        total = total + torch.autograd.grad(score, blocks[-1]["attention"])[0] / steps
    return total


@pytest.fixture(params=[*VITS, "class token, pooled patches"])
def setting(request):
    """Return a model, images, and the queries whose rows the map shows."""
    if request.param in VITS:
        model, images = model_and_images(request.param)
        return model, images, query_tokens(model)
    return models.vit(global_pool="avg"), models.pictures(64), list(range(1, 17))


@pytest.mark.parametrize(("steps", "path", "first"), [(5, "attention", 0), (1, "attention", 2), (3, "image", 1)])
def test_beyond_intuition_matches_its_equation(setting, steps, path, first):
    model, images, queries = setting
    gradient = {"attention": gradient_along_attention, "image": gradient_along_image}[path](model, images, steps)
    blocks, _ = parts_of(model, images)
    expected = [slow_beyond_intuition(model, blocks, gradient, b, first, queries) for b in range(len(images))]
    found = BeyondIntuition(steps=steps, path=path, first=first)(model, images)
    assert_same_map(found, expected)
    assert found.source == "all 3 layers of attention"


def slow_tokentm(model, blocks, gradients, b, queries):
    count = blocks[0]["before"].shape[1]

    def weights(before, after):
        similar = [math.exp(cosine(x, y)) for x, y in zip(before, after, strict=True)]
        mean = sum(similar) / count
        lengths = [length(y) / length(x) for x, y in zip(before, after, strict=True)]
        return torch.diag(
            torch.tensor([a * s / mean for a, s in zip(lengths, similar, strict=True)], dtype=torch.float64)
        )

    contribution = torch.diag(torch.tensor([length(x) for x in blocks[0]["before"][b]], dtype=torch.float64))
    for part, gradient in zip(blocks, gradients, strict=True):
        attention = (part["attention"][b].detach() * gradient[b]).clamp(min=0).mean(0)
        contribution = contribution + attention @ weights(part["before"][b], transformed(part, b)) @ contribution
        middle, after = part["middle"][b].detach(), part["after"][b].detach()
        contribution = contribution + weights(middle, after - middle) @ contribution
    return patches_on_grid(model, contribution[queries].mean(0))


def test_tokentm_matches_its_equation(setting):
    model, images, queries = setting
    blocks, output = parts_of(model, images)
    gradients = torch.autograd.grad(output.amax(1).sum(), [part["attention"] for part in blocks])
    blocks = [{name: value.detach() for name, value in part.items()} for part in blocks]
    expected = [slow_tokentm(model, blocks, gradients, b, queries) for b in range(len(images))]
    assert_same_map(TokenTM()(model, images), expected)


def timm_copy(model):
    """Return timm's ViT with the weights of torchvision's."""
    twin = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3, mlp_ratio=2, num_classes=7
    )
    weights = {
        "cls_token": model.class_token,
        "pos_embed": model.encoder.pos_embedding,
        "patch_embed.proj": model.conv_proj,
        "norm": model.encoder.ln,
        "head": model.heads.head,
    }
    for i, layer in enumerate(model.encoder.layers):
        weights |= {
            f"blocks.{i}.norm1": layer.ln_1,
            f"blocks.{i}.norm2": layer.ln_2,
            f"blocks.{i}.attn.proj": layer.self_attention.out_proj,
            f"blocks.{i}.mlp.fc1": layer.mlp[0],
            f"blocks.{i}.mlp.fc2": layer.mlp[3],
            f"blocks.{i}.attn.qkv.weight": layer.self_attention.in_proj_weight,
            f"blocks.{i}.attn.qkv.bias": layer.self_attention.in_proj_bias,
        }
    state = {}
    for name, part in weights.items():
        if isinstance(part, torch.Tensor):
            state[name] = part
        else:
            state |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    twin.load_state_dict(state)
    return twin.eval()


@pytest.mark.parametrize("method", [TokenTM(), BeyondIntuition(), BeyondIntuition(path="image", steps=2), LeGrad()])
def test_torchvisions_vit_has_the_map_of_timms_vit_with_its_weights(method):
    model, images = models.torchvision_vit(), models.pictures(64)
    twin = timm_copy(model)
    torch.testing.assert_close(twin(images), model(images), atol=1e-5, rtol=1e-4)
    assert_same_map(method(model, images), list(method(twin, images).raw))


@pytest.mark.parametrize("method", [TokenTM(), BeyondIntuition()])
def test_dinov3_and_transformers_are_explained(method):
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64}
    options = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 2, "num_classes": 7}
    for model in (
        transformers.ViTForImageClassification(transformers.ViTConfig(**small)),
        timm.create_model("vit_small_patch16_dinov3", **options),
    ):
        maps = method(models.randomised(model), models.pictures(64))
        assert maps.raw.shape == (2, 4, 4)
        assert maps.raw.abs().sum() > 0


SMALL = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 2, "num_classes": 7}


def with_blocks(block):
    return timm.create_model("vit_tiny_patch16_224", block_fn=block, init_values=1.0, **SMALL)


def dinov2():
    config = transformers.Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=64)
    return transformers.Dinov2ForImageClassification(config)


@pytest.mark.parametrize(
    ("make", "pairs"),
    [
        (lambda: with_blocks(vision_transformer.Block), {"ls1.gamma": "attn", "ls2.gamma": "mlp"}),
        (lambda: timm.create_model("deit3_small_patch16_224", **SMALL), {"ls1.gamma": "attn"}),
        (lambda: timm.create_model("vit_small_patch16_dinov3", **SMALL), {"gamma_1": "attn"}),
        (dinov2, {"layer_scale1.lambda1": "attention", "layer_scale2.lambda1": "mlp"}),
    ],
)
@pytest.mark.parametrize("method", [TokenTM(), BeyondIntuition()])
def test_layer_scale_counts_as_part_of_the_projection(make, pairs, method):
    model, images = models.randomised(make()), models.pictures(64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(tuple(pairs)):
                parameter.copy_(torch.linspace(0.2, 2, 48))
    twin, folded = copy.deepcopy(model), 0
    with torch.no_grad():
        for name, scale in twin.named_parameters():
            for of_scale, of_projection in pairs.items():
                if name.endswith(of_scale):
                    part = twin.get_submodule(name.removesuffix(of_scale) + of_projection)
                    projection = [module for module in part.modules() if isinstance(module, torch.nn.Linear)][-1]
                    projection.weight *= scale[:, None]
                    projection.bias *= scale
                    scale.fill_(1)
                    folded += 1
    assert folded == 2 * len(pairs)
    maps, of_twin = method(model, images), method(twin, images)
    output, expected = maps.output, of_twin.output
    torch.testing.assert_close(*(getattr(x, "logits", x) for x in (output, expected)), atol=1e-4, rtol=1e-4)
    assert_same_map(maps, list(of_twin.raw))


class Encoder(torch.nn.Module):
    """A ViT of torch's encoder layers."""

    def __init__(self, norm_first):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 48, 16, 16)
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(48, 2, 96, batch_first=True, norm_first=norm_first) for _ in range(2)
        )
        self.head = torch.nn.Linear(48, 7)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).mT
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("method", [TokenTM, BeyondIntuition])
def test_blocks_that_normalise_after_the_attention_are_refused(method):
    images = models.pictures(64)
    for model, name in (
        (with_blocks(vision_transformer.ResPostBlock), "blocks.0"),
        (Encoder(norm_first=False), "layers.0"),
    ):
        with pytest.raises(
            UsageError,
            match=f"{method.name} needs blocks that normalise their tokens before the attention, and {name} does so",
        ):
            method()(models.randomised(model), images)
    assert method()(models.randomised(Encoder(norm_first=True)), images).raw.abs().sum() > 0


@pytest.mark.parametrize("method", [TokenTM, BeyondIntuition])
def test_windows_feature_maps_and_attention_by_softmax_are_refused(method):
    model = models.vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    message = f"{method.name} needs a ViT: all layers of attention in blocks in which all tokens attend to all tokens"
    maps = timm.create_model("coatnet_nano_rw_224", img_size=64).eval()  # its blocks return feature maps
    pvt = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)).eval()  # only its last stage would fit
    for other, size in ((model, 64), (models.swin(depths=(2,), num_heads=(2,)), 32), (maps, 64), (pvt, 64)):
        with pytest.raises(UsageError, match=message):
            method()(other, models.pictures(size))


def test_arguments_out_of_range_are_refused():
    with pytest.raises(UsageError, match="steps must be at least 1, got 0"):
        BeyondIntuition(steps=0)
    with pytest.raises(UsageError, match="path must be attention or image, got 'input'"):
        BeyondIntuition(path="input")
    with pytest.raises(UsageError, match="first must be at least 0, got -1"):
        BeyondIntuition(first=-1)
    with pytest.raises(UsageError, match="there is no layer 3: beyond_intuition uses 3 layers of this model"):
        BeyondIntuition(first=3)(models.vit(), models.pictures(64))


def test_a_projection_that_is_not_linear_is_an_error():
    model = models.vit(depth=1)
    model.blocks[0].attn.proj = torch.nn.Identity()
    model.blocks[0].mlp = torch.nn.Identity()
    with pytest.raises(
        UsageError, match=r"no linear layer follows the attention of blocks, so its transformed tokens are not known"
    ):
        BeyondIntuition()(model, models.pictures(64))


def test_a_path_over_images_costs_a_pass_and_a_gradient_for_each_step():
    model, images = models.vit(), models.pictures(64)
    assert BeyondIntuition().passes(model, images) == 3
    assert BeyondIntuition(path="image", steps=7).passes(model, images) == 16
