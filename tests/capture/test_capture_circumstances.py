"""Captures of frozen, compiled, parallel and partial models, in every gradient mode and precision."""

import pytest
import torch
from torch import nn

from tests.capture import models
from tests.capture.models import FAMILIES, kept
from visionattn.capture import FullAttention, HeadMean, capture
from visionattn.maps import GradientAttention, RawAttention, Rollout

close = torch.testing.assert_close


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("family", ["vit", "torchvision vit", "swin"])
@pytest.mark.parametrize("frozen", [True, False])
def test_capture_works_on_frozen_models_and_in_every_gradient_mode(context, family, frozen):
    make, size = FAMILIES[family]
    model, images = make().requires_grad_(not frozen), models.pictures(size)
    reference = kept(model, images, FullAttention())
    with context(), capture(model, FullAttention()) as records:
        out = model(images)
    assert out.requires_grad == (not frozen and context is torch.enable_grad)
    for record, expected in zip(records, reference, strict=True):
        assert not record.weights.requires_grad
        close(record.weights, expected.weights, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["vit", "torchvision vit", "swin"])
def test_capture_works_in_bfloat16(family):
    make, size = FAMILIES[family]
    model, images = make(), models.pictures(size)
    expected = kept(model, images, HeadMean())
    for record, reference in zip(kept(model.bfloat16(), images.bfloat16(), HeadMean()), expected, strict=True):
        assert record.weights.dtype == torch.float32
        close(record.weights.sum(-1), torch.ones(record.weights.shape[:-1]), atol=2e-2, rtol=0)
        close(record.weights, reference.weights, atol=0.1, rtol=0)


def test_capture_works_under_autocast():
    model, images = models.vit(), models.pictures()
    expected = kept(model, images, HeadMean())
    with torch.autocast("cpu", torch.bfloat16):
        found = kept(model, images, HeadMean())
    for record, reference in zip(found, expected, strict=True):
        close(record.weights.sum(-1), torch.ones(record.weights.shape[:-1]))
        close(record.weights, reference.weights, atol=0.1, rtol=0)


@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "a block", "a function"])
def test_capture_works_on_compiled_models(how):
    import torch._dynamo

    torch._dynamo.reset()
    model, images = models.vit(depth=2), models.pictures()
    expected = kept(model, images, FullAttention())
    compiled = model
    if how == "torch.compile":
        compiled = torch.compile(model, backend="eager")
    elif how == "model.compile":
        model.compile(backend="eager")
    elif how == "a block":
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    else:
        model.blocks[1].attn.forward = torch.compile(model.blocks[1].attn.forward, backend="eager")
    with torch.no_grad():
        expected_out = compiled(images)  # compiled before the capture
        found = kept(compiled, images, FullAttention())
        assert len(found) == 2
        for record, reference in zip(found, expected, strict=True):
            close(record.weights, reference.weights, atol=1e-5, rtol=0)
        close(compiled(images), expected_out)


@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_code_runs_after_a_capture_without_recompilation(how, backend):
    import torch._dynamo

    torch._dynamo.reset()
    runs = []

    def counted(graph, inputs):
        compiled = torch._dynamo.lookup_backend(backend)(graph, inputs)

        def run(*args):
            runs.append(backend)
            return compiled(*args)

        return run

    model, images = models.vit(depth=2), models.pictures()
    expected = kept(model, images, FullAttention())
    compiled = model
    if how == "torch.compile":
        compiled = torch.compile(model, backend=counted)
    else:
        model.compile(backend=counted)
    stats = torch._dynamo.utils.counters["stats"]
    with torch.no_grad():
        expected_out = compiled(images)
        graphs, runs_per_call = stats["unique_graphs"], len(runs)
        assert runs_per_call > 0
        found = kept(compiled, images, FullAttention())
        assert len(found) == len(expected) == 2
        for record, reference in zip(found, expected, strict=True):
            close(record.weights, reference.weights, atol=1e-5, rtol=0)
        assert len(runs) == runs_per_call  # compiled code does not run during a capture
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(compiled(images), expected_out)
    assert len(runs) == 2 * runs_per_call
    assert stats["unique_graphs"] == graphs


def test_capture_works_on_data_parallel_models():
    model, images = models.vit(depth=2), models.pictures()
    assert len(kept(nn.DataParallel(model), images, FullAttention())) == 2


def test_capture_works_on_a_part_of_a_model():
    model, images = models.vit(), models.pictures()
    net = nn.Sequential(model, nn.Linear(7, 2))
    records = kept(net, images, FullAttention())
    assert [record.name for record in records] == [f"0.blocks.{i}.attn" for i in range(3)]
    with torch.no_grad(), capture(model, FullAttention()) as inner:
        net(images)
    close(inner[0].weights, records[0].weights)
    assert inner[0].name == "blocks.0.attn"


@pytest.mark.parametrize("make", [models.vit, models.torchvision_vit, models.swin])
def test_nested_captures_of_a_model_both_record_its_attention(make):
    model = make()
    images = models.pictures(32 if make is models.swin else 64)
    alone = kept(model, images, FullAttention())
    with torch.no_grad(), capture(model, FullAttention()) as outer, capture(model, HeadMean()) as inner:
        model(images)
    assert outer.unlabelled == inner.unlabelled == {}
    for record, mean, reference in zip(outer.attention, inner.attention, alone, strict=True):
        close(record.weights, reference.weights, atol=1e-6, rtol=0)
        close(mean.weights, reference.weights.mean(2), atol=1e-6, rtol=0)


def test_a_capture_records_model_calls_inside_heatmap_methods_and_leaves_the_heatmaps_unchanged():
    model, images = models.vit(), models.pictures()
    methods = RawAttention(), Rollout(), GradientAttention()
    expected = [method(model, images).raw for method in methods]
    with capture(model) as records:
        found = [method(model, images).raw for method in methods]
    assert len(records) == 9
    assert records.unlabelled == {}
    for raw, reference in zip(found, expected, strict=True):
        close(raw, reference, atol=1e-6, rtol=1e-5)
