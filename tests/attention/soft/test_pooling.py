"""Test attention pooling: all scores and normalisers against loops, captured maps, and classification heads."""

import itertools
import math
import warnings

import pytest
import timm
import torch
from torch import nn

from tests.attention.mechanisms import image, randomised
from tests.attention.soft.bisection import by_bisection
from tests.refusals import refuses
from tests.versions import needs_onnx_exporter
from visionattn.attention import (
    AdditiveScore,
    AttentionHead,
    AttentionPool,
    BilinearScore,
    CosineScore,
    DotScore,
    Entmax15,
    GatedScore,
    NormalisedSigmoid,
    ScaledDotScore,
    Softmax,
    Sparsemax,
)
from visionattn.capture import FullAttention, capture
from visionattn.maps import RawAttention
from visionattn.models import ConvNet

C, K = 4, 3


def matrix(w, name):
    """Return the weight of a 1 × 1 convolution as a matrix."""
    return w[f"{name}.weight"].flatten(1)


SCORES = {  # class: score of map k, from weights w, the features x of one position, and their mean over positions
    DotScore: lambda w, x, mean, k: matrix(w, "query")[k] @ x,
    ScaledDotScore: lambda w, x, mean, k: matrix(w, "query")[k] @ x / math.sqrt(C),
    AdditiveScore: lambda w, x, mean, k: matrix(w, "query")[k] @ torch.tanh(matrix(w, "hidden") @ x + w["hidden.bias"]),
    BilinearScore: lambda w, x, mean, k: (w["query.weight"][k * C : k * C + C] @ mean) @ x,
    CosineScore: lambda w, x, mean, k: w["beta"] * (w["query"][k] @ x) / (w["query"][k].norm() * x.norm()),
    GatedScore: lambda w, x, mean, k: (
        matrix(w, "query")[k]
        @ (
            torch.tanh(matrix(w, "hidden")[:2] @ x + w["hidden.bias"][:2])
            * torch.sigmoid(matrix(w, "hidden")[2:] @ x + w["hidden.bias"][2:])
        )
    ),
}
NORMALISERS = {  # class: weights from the list of scores of one map
    Softmax: lambda s: torch.tensor([math.exp(v) / sum(map(math.exp, s)) for v in s]),
    Sparsemax: lambda s: by_bisection(s, 1),
    Entmax15: lambda s: by_bisection(s, 2),
    NormalisedSigmoid: lambda s: torch.tensor(
        [1 / (1 + math.exp(-v)) / sum(1 / (1 + math.exp(-u)) for u in s) for v in s]
    ),
}


def pool_of(score, normaliser, maps=K):
    torch.manual_seed(0)
    return randomised(AttentionPool(C, maps=maps, score=score, normaliser=normaliser())).eval()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_pooling_matches_its_equation_and_its_map_is_captured(score, normaliser):
    pool = pool_of(score, normaliser).double()
    x = image(2, C, 3, 5)
    w = {name.removeprefix("score."): value for name, value in pool.state_dict().items()}
    out, maps = torch.zeros(2, K, C, dtype=torch.float64), torch.empty(2, K, 3, 5, dtype=torch.float64)
    for b, k in itertools.product(range(2), range(K)):
        positions = x[b].flatten(1).T
        scores = [float(SCORES[score](w, features, x[b].mean((1, 2)), k)) for features in positions]
        p = NORMALISERS[normaliser](scores)
        maps[b, k] = p.view(3, 5)
        for n in range(15):
            out[b, k] += p[n] * positions[n]
    torch.testing.assert_close(pool(x), out, atol=1e-6, rtol=1e-5)
    with torch.no_grad(), capture(pool, FullAttention()) as records:
        pool(x)
    (record,) = records
    assert record.grid == (3, 5)
    assert record.kind == ("cross" if normaliser is Softmax else "spatial_gate")
    torch.testing.assert_close(record.weights.double().view(2, K, 3, 5), maps, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_gradients_are_finite_for_every_shape_and_precision(score, normaliser):
    for shape, dtype in (((1, 1, 1), torch.float32), ((3, 5, 9), torch.bfloat16), ((2, 7, 4), torch.float32)):
        pool = pool_of(score, normaliser).to(dtype)
        x = torch.randn(shape[0], C, *shape[1:]).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
        out = pool(x)
        assert out.shape == (shape[0], K, C)
        assert out.dtype == dtype
        out.float().square().sum().backward()
        assert x.grad.isfinite().all()
        assert all(parameter.grad is not None for parameter in pool.parameters())


@pytest.mark.parametrize(("score", "normaliser"), [*zip(SCORES, itertools.cycle(NORMALISERS), strict=False)])
def test_pooling_compiles_and_exports(score, normaliser):
    pool, x = pool_of(score, normaliser), torch.randn(2, C, 3, 5)
    with torch.no_grad():
        expected = pool(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(pool, backend="aot_eager", fullgraph=True)(x), expected)
        torch.testing.assert_close(torch.export.export(pool, (x,)).module()(x), expected)


@needs_onnx_exporter
@pytest.mark.parametrize(("score", "normaliser"), [*zip(SCORES, itertools.cycle(NORMALISERS), strict=False)])
def test_pooling_exports_to_onnx(score, normaliser, tmp_path):
    import onnxruntime

    pool, x = pool_of(score, normaliser), torch.randn(2, C, 3, 5)
    with torch.no_grad():
        expected = pool(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(pool, (x,), tmp_path / "pool.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "pool.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), expected, atol=1e-5, rtol=1e-4)


def test_head_is_pooling_followed_by_a_linear_layer():
    torch.manual_seed(0)
    head = randomised(AttentionHead(C, 5)).double()
    x = image(2, C, 3, 4)
    pooled, found = head.pool(x).detach(), head(x).detach()
    weight, bias = head.weight.detach(), head.bias.detach()
    for b, k in itertools.product(range(2), range(5)):
        expected = sum(float(weight[k, c] * pooled[b, 0, c]) for c in range(C)) + float(bias[k])
        assert float(found[b, k]) == pytest.approx(expected)


def test_class_wise_head_has_a_map_for_every_class():
    torch.manual_seed(0)
    head = randomised(AttentionHead(C, 5, class_wise=True)).double()
    x = image(2, C, 3, 4)
    pooled, found = head.pool(x).detach(), head(x).detach()
    weight, bias = head.weight.detach(), head.bias.detach()
    assert pooled.shape == (2, 5, C)
    for b, k in itertools.product(range(2), range(5)):
        expected = sum(float(weight[k, c] * pooled[b, k, c]) for c in range(C)) + float(bias[k])
        assert float(found[b, k]) == pytest.approx(expected)


def test_maps_of_two_classes_in_one_image_peak_at_their_objects():
    """An object of class k is a high value in channel k; the query and the weights of class k select this channel."""
    head = AttentionHead(3, 3, class_wise=True)
    with torch.no_grad():
        head.pool.score.query.weight.copy_(3 * torch.eye(3)[..., None, None])
        head.weight.copy_(torch.eye(3))
        x = torch.zeros(1, 3, 5, 6)
        x[0, 0, 1, 2] = x[0, 2, 4, 5] = 4
        with capture(head, FullAttention()) as records:
            logits = head(x)
    maps = records[0].weights.view(3, 30)
    assert maps[0].argmax() == 1 * 6 + 2
    assert maps[2].argmax() == 4 * 6 + 5
    torch.testing.assert_close(maps[1], torch.full((30,), 1 / 30))  # no object of class 1
    torch.testing.assert_close(logits, torch.tensor([[4.0, 0, 4]]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("class_wise", [False, True])
def test_raw_attention_gives_heatmaps_of_a_convnet_with_attention_head(class_wise):
    model = ConvNet(4, head=lambda channels, classes: AttentionHead(channels, classes, class_wise=class_wise)).eval()
    images = torch.randn(2, 3, 32, 48)
    maps = RawAttention()(model, images)
    assert maps.heatmaps.shape == (2, 4, 6)
    assert maps.output.shape == (2, 4)


def test_head_works_after_timm_feature_maps():
    body = timm.create_model("resnet10t", num_classes=0, global_pool="")
    model = nn.Sequential(body, AttentionHead(body.num_features, 10)).eval()
    assert model(torch.randn(2, 3, 64, 96)).shape == (2, 10)
    assert RawAttention()(model, torch.randn(2, 3, 64, 96)).heatmaps.shape == (2, 2, 3)


def test_invalid_arguments_raise():
    refuses(ValueError, "maps must be ≥ 1, got 0", AttentionPool, 4, maps=0)
    refuses(ValueError, "width must be ≥ 1, got 0", GatedScore, 4, 1, width=0)
    with pytest.raises(ValueError, match=r"pool does not apply to a custom head, .*; leave pool out, got 2"):
        ConvNet(4, head=AttentionHead, pool=2)
