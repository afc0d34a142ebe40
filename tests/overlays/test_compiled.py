"""Compilation of unwatched parts changes no heatmap."""

import pytest
import timm
import torch

from visionattn.errors import UsageError
from visionattn.maps import GradCAM, Rollout
from visionattn.overlays.compiled import compiled

IMAGES = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(0))


def graphs(monkeypatch):
    """Counts what dynamo hands to its backend."""
    seen = []

    def backend(graph, example):
        seen.append(len(graph.graph.nodes))
        return graph.forward

    return seen, backend


@pytest.mark.parametrize(
    ("name", "method", "part", "watched"),
    [("test_vit", Rollout(), "blocks.5.mlp", "attn"), ("test_resnet", GradCAM("layer4"), "layer1.0", "layer4")],
)
def test_unwatched_parts_are_compiled_and_the_maps_stay(name, method, part, watched, monkeypatch):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = timm.create_model(name).eval()
    expected = method(model, IMAGES)
    before = {name: (list(vars(module)), module.training) for name, module in model.named_modules()}
    seen, backend = graphs(monkeypatch)
    with compiled(model, method, IMAGES[:2], backend=backend) as parts:
        assert part in parts
        assert not any(watched == name.rpartition(".")[2] for name in parts)
        assert seen
        found = method(model, IMAGES)
    torch.testing.assert_close(found.heatmaps, expected.heatmaps, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.output, expected.output)
    assert {name: (list(vars(module)), module.training) for name, module in model.named_modules()} == before
    count = len(seen)
    method(model, IMAGES)
    assert len(seen) == count


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("test_vit", Rollout()), ("test_resnet", GradCAM("layer4"))])
def test_the_real_compiler_gives_the_same_maps(name, method):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    expected = method(model, IMAGES)
    with compiled(model, method, IMAGES[:2]):
        found = method(model, IMAGES)
    torch.testing.assert_close(found.heatmaps, expected.heatmaps, atol=1e-4, rtol=0)


def test_a_model_without_unwatched_parts_is_refused():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
    model.append(torch.nn.Linear(64, 3))
    with (
        pytest.raises(UsageError, match="nothing can be compiled; leave compile out"),
        compiled(model, GradCAM("1"), IMAGES),
    ):
        pass
