"""LeGrad matches its equation in slow loops and torchcam, on class tokens, mean pooling, registers and windows."""

import copy
import threading

import pytest
import timm
import torch
import transformers

from tests.capture import models
from tests.maps.methods.vits import VITS, assert_same_map, model_and_images, patches_on_grid, set_fused
from tests.versions import needs
from visionattn.errors import UsageError
from visionattn.maps import LeGrad

close = torch.testing.assert_close


def slow_legrad(model, image, pooling, target=None):
    """Return the map of one image by a timm ViT's own unfused path, one layer, head and query at a time, in float64."""
    model, attention, outputs = copy.deepcopy(model).double(), [], []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: attention.append(args[0]))
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    scores = model(image[None].double())[0]
    target = int(scores.argmax()) if target is None else target
    total = torch.zeros(attention[0].shape[-1], dtype=torch.float64)
    for weights, tokens in zip(attention, outputs, strict=True):
        if pooling == "mean":
            tokens = tokens.mean(1, keepdim=True).repeat(1, tokens.shape[1], 1)
        score = model.forward_head(model.norm(tokens))[0, target]
        (gradient,) = torch.autograd.grad(score, weights, retain_graph=True)
        _, heads, queries, keys = gradient.shape
        for h in range(heads):
            for q in range(queries):
                for k in range(keys):
                    total[k] += max(float(gradient[0, h, q, k]), 0.0) / (heads * queries * len(attention))
    return patches_on_grid(model, total)


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("pooling", ["model", "mean"])
@pytest.mark.parametrize("fused_attn", [True, False])
def test_legrad_matches_its_equation(name, pooling, fused_attn):
    model, images = model_and_images(name)
    expected = [slow_legrad(model, image, pooling) for image in images]
    set_fused(model, fused_attn)
    maps = LeGrad(pooling=pooling)(model, images)
    assert_same_map(maps, expected)
    assert maps.source == "all 3 layers of attention"


def test_legrad_of_dinov3_matches_its_equation():
    options = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 2, "num_classes": 7}
    model, images = models.randomised(timm.create_model("vit_small_patch16_dinov3", **options)), models.pictures(64)
    assert_same_map(LeGrad()(model, images), [slow_legrad(model, image, "model") for image in images])


@pytest.mark.parametrize("target", [0, torch.tensor([4, 2])])
def test_a_target_function_equals_a_target_index(target):
    model, images = models.vit(), models.pictures(64)
    maps = LeGrad()(model, images, target=target)
    found = LeGrad()(model, images, target=lambda output: output[torch.arange(2), target])
    close(found.raw, maps.raw)
    indices = [target] * 2 if isinstance(target, int) else target.tolist()
    assert_same_map(maps, [slow_legrad(model, x, "model", k) for x, k in zip(images, indices, strict=True)])


def test_legrad_agrees_with_torchcam_on_torchvisions_vit():
    torchcam = pytest.importorskip("torchcam.methods", reason="torchcam needs Python 3.11")
    model, images = models.torchvision_vit(), models.pictures(64)
    with torchcam.LeGrad(model, list(model.encoder.layers)) as cam:
        expected = cam([3, 5], model(images))[0]
    found = LeGrad(pooling="mean")(models.torchvision_vit(), images, target=torch.tensor([3, 5]))
    close(found.heatmaps, expected, atol=1e-4, rtol=0)


def by_autograd(model, images, layers, name, score):
    """Return mean_l relu(∂s_l / ∂A_l), averaged over heads and queries, of a model of transformers."""
    attention, outputs, total = [], [], 0
    for layer in layers:
        layer.register_forward_hook(lambda module, args, out: outputs.append(out))
        layer.get_submodule(name).register_forward_hook(lambda module, args, out: attention.append(out[1]))
    target = model(images).logits.argmax(1)
    for weights, tokens in zip(attention, outputs, strict=True):
        (gradient,) = torch.autograd.grad(score(tokens)[[0, 1], target].sum(), weights, retain_graph=True)
        total = total + gradient.relu().mean((1, 2))[:, 1:].unflatten(1, (4, 4)) / len(layers)
    return list(total)


SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "num_labels": 7}


@needs("transformers", "5.24", "the present names of a ViT's blocks")
def test_legrad_of_transformers_vit_matches_its_equation():
    model = models.randomised(transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)))
    eager, images = copy.deepcopy(model), models.pictures(64)
    eager.config._attn_implementation = "eager"
    expected = by_autograd(
        eager, images, eager.vit.layers, "attention", lambda tokens: eager.classifier(eager.vit.layernorm(tokens)[:, 0])
    )
    assert_same_map(LeGrad()(model, images), expected)


def test_legrad_through_shifted_windows_matches_its_equation():
    model, images = models.swin(depths=(2,), num_heads=(2,)), models.pictures(32)
    reference, attention, outputs = copy.deepcopy(model).double(), [], []
    for block in reference.layers[0].blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: attention.append(args[0]))
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    target = reference(images.double()).argmax(1)
    expected = torch.zeros(2, 64, dtype=torch.float64)
    for weights, tokens, shift in zip(attention, outputs, (0, 2), strict=True):
        score = reference.forward_head(reference.norm(tokens))[[0, 1], target].sum()
        (gradient,) = torch.autograd.grad(score, weights, retain_graph=True)
        for b, windows in enumerate(gradient.unflatten(0, (2, -1))):
            for cells, part in zip(models.cells_of_windows(8, 4, shift), windows, strict=True):
                for k, cell in enumerate(cells):
                    expected[b, cell] += part[:, :, k].clamp(min=0).mean() / 2
    assert_same_map(LeGrad()(model, images), list(expected.unflatten(1, (8, 8))))


def test_a_model_that_merges_patches_is_explained_by_its_last_stage():
    assert LeGrad()(models.swin(), models.pictures(32)).source == "2 of 4 layers of attention"


@pytest.mark.parametrize(("name", "runs"), [("vit", 3), ("registers", 3), ("no class token", 6)])
def test_attention_runs_a_second_time_only_if_the_model_pools_patches(name, runs):
    model, images = model_and_images(name)
    LeGrad()(model, images)  # surveys the model
    shapes = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    LeGrad()(model, images)
    assert sum(batch == 2 and tokens > 1 for batch, tokens, _ in shapes) == runs  # a survey has one image


def test_a_score_of_several_blocks_is_refused():
    class Skips(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = models.vit()

        def forward(self, images):
            tokens = self.vit.patch_embed(images)
            middle = self.vit.blocks[0](tokens)
            return self.vit.head((self.vit.blocks[1](middle) + middle).mean(1))

    with pytest.raises(UsageError, match=r"legrad needs a score .* of the last block, vit\.blocks\.1, .*; use chefer"):
        LeGrad()(Skips().eval(), models.pictures(64))


def test_a_model_whose_last_attention_returns_one_token_is_refused():
    model = timm.create_model("cait_xxs24_224", img_size=64, depth=1).eval()
    with pytest.raises(UsageError, match=r"legrad needs blocks of self-attention that return all tokens, .* this Cait"):
        LeGrad()(model, models.pictures(64))
    with pytest.raises(UsageError, match="pooling must be model or mean, got 'max'"):
        LeGrad(pooling="max")


def test_another_thread_that_runs_the_model_meanwhile_is_not_disturbed():
    model, images = models.vit(), models.pictures(64)
    with torch.no_grad():
        expected = model(images)
    found, stop = [], threading.Event()

    def run():
        with torch.no_grad():
            while not stop.is_set():
                found.append(model(images))

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(5):
        LeGrad()(model, images)
    stop.set()
    thread.join()
    assert found
    for output in found:
        close(output, expected)


def test_threads_that_explain_one_model_at_once_leave_it_unchanged():
    model, images = models.vit(), models.pictures(64)
    expected, found, errors = LeGrad()(model, images).raw, [], []

    def explain():
        try:
            found.extend(LeGrad()(model, images).raw for _ in range(20))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=explain) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(found) == 60
    for raw in found:
        close(raw, expected)
    assert not any("forward" in vars(module) for module in model.modules())
