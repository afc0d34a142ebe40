"""Test every mechanism: shapes, memory formats, gradients, weights, capture, compilation, export."""

import math
import warnings

import pytest
import torch
from torch import nn

from tests.attention.mechanisms import MECHANISMS, randomised
from tests.versions import needs_onnx_exporter
from visionattn.attention import AttentionGate, SplitAttention
from visionattn.capture import NoWeights, capture
from visionattn.maps import Gate

every = pytest.mark.parametrize("mechanism", MECHANISMS.values(), ids=MECHANISMS)
SHAPES = [(1, 1, 2, 3), (2, 7, 5, 9), (1, 16, 8, 8), (3, 8, 14, 6)]


# a bias that is added to all scores of a softmax has no effect, so its gradient is zero up to rounding
BIAS_OF_SOFTMAX = {"attention.conv_attn.bias"}


def make(mechanism, channels):
    torch.manual_seed(0)
    return randomised(mechanism(channels))


@every
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_dtype_and_layout_are_kept_and_gradients_are_finite(mechanism, shape, dtype):
    if mechanism is SplitAttention and shape[1] % 2:
        with pytest.raises(
            ValueError, match=rf"radix ≥ 2 and channels that are a multiple of radix, .*=2 and {shape[1]}"
        ):
            mechanism(shape[1])
        return
    module = make(mechanism, shape[1]).to(dtype)
    x = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    out = module(x)
    assert out.shape == x.shape
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@every
def test_one_module_accepts_any_size_and_layout(mechanism):
    module = make(mechanism, 8).eval()
    for size in ((16, 16), (5, 9), (7, 7), (1, 4), (4, 1), (1, 1)):
        x = torch.randn(2, 8, *size)
        with torch.no_grad():
            out = module(x)
            assert out.shape == x.shape
            assert out.isfinite().all()
            torch.testing.assert_close(module(x.to(memory_format=torch.channels_last)), out, atol=1e-5, rtol=1e-4)


@every
def test_images_of_a_batch_are_independent(mechanism):
    module = make(mechanism, 8).eval()
    x = torch.randn(3, 8, 6, 4)
    with torch.no_grad():
        torch.testing.assert_close(module(x)[1:2], module(x[1:2]), atol=1e-5, rtol=1e-4)


@every
def test_every_parameter_has_a_gradient(mechanism):
    module = make(mechanism, 64)  # wide enough that no ReLU bottleneck is entirely 0
    module(torch.randn(8, 64, 6, 5, requires_grad=True)).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    assert {name for name, gradient in gradients.items() if not gradient.any()} <= BIAS_OF_SOFTMAX


@every
def test_weights_load_strictly_into_another_instance(mechanism):
    first, second = make(mechanism, 8).eval(), mechanism(8).eval()
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(second(x), first(x))


@pytest.mark.parametrize("mechanism", [m for name, m in MECHANISMS.items() if name != "BilinearAttention"])
def test_mechanism_is_captured_without_changing_its_output(mechanism):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), make(mechanism, 8)).eval()
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        expected = model(images)
        with capture(model, NoWeights()) as records:
            found = model(images)
    assert torch.equal(found, expected)
    assert len(records) > 0
    assert not records.unlabelled
    assert not records.missed
    assert all(record.name.startswith("1") for record in records)


def times_gates(x, gates):
    """Multiply the input by all gates."""
    return x * math.prod(gates)


APPLY = {  # mechanism: compute the output from the input and the captured gates
    **dict.fromkeys(
        ("SE", "EffectiveSE", "ECA", "CircularECA", "WideECA", "GCT", "FcaNet", "GlobalContextGate"), times_gates
    ),
    **dict.fromkeys(("CoordinateAttention", "SimpleCoordinateAttention", "ELA", "StripAttention"), times_gates),
    **dict.fromkeys(("CBAM", "LightCBAM", "SimAM", "TripletAttention", "LSKA", "GlobalContextGate"), times_gates),
    "BAM": lambda x, gates: x + x * gates[0],
    "EMA": lambda x, gates: x * gates[0].repeat_interleave(x.shape[1] // gates[0].shape[1], 1),
    "GatherExcite": lambda x, gates: x * nn.functional.interpolate(gates[0], x.shape[2:]),
}


@pytest.mark.parametrize("name", APPLY)
@pytest.mark.parametrize("size", [(7, 10), (8, 8)])
def test_captured_gates_reproduce_the_output(name, size):
    module = make(MECHANISMS[name], 16).eval()
    x = torch.randn(2, 16, *size)
    with torch.no_grad(), capture(module, NoWeights()) as records:
        out = module(x)
    gates = [record.weights for record in records.gates]
    torch.testing.assert_close(APPLY[name](x, gates), out, atol=1e-5, rtol=1e-4)
    grids = {record.grid for record in records.gates if record.kind == "spatial_gate"}
    assert grids <= {size, (size[0], 1), (1, size[1])} or name == "GatherExcite"
    if grids:
        assert Gate()(module, x).raw.shape == (2, *(size if name != "GatherExcite" else (-(-n // 4) for n in size)))


def assert_compiles_in_one_graph(module, backend, *more_inputs):
    """Assert that the compiled module has the same output and the same gradient of its first input."""
    torch._dynamo.reset()
    x, y = torch.randn(2, 8, 6, 5), torch.randn(2, 8, 6, 5, requires_grad=True)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, *more_inputs), module(x, *more_inputs), atol=1e-5, rtol=1e-4)
    (expected,) = torch.autograd.grad(module(y, *more_inputs).square().sum(), y)
    (found,) = torch.autograd.grad(compiled(y, *more_inputs).square().sum(), y)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@every
def test_mechanism_compiles_in_one_graph(mechanism):
    assert_compiles_in_one_graph(make(mechanism, 8).eval(), "aot_eager")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_mechanisms_compile_with_inductor():
    for mechanism in MECHANISMS.values():
        assert_compiles_in_one_graph(make(mechanism, 8).eval(), "inductor")
    gate = make(lambda channels: AttentionGate(channels, 4), 8).eval()
    assert_compiles_in_one_graph(gate, "inductor", torch.randn(2, 4, 3, 3))


@every
def test_mechanism_exports_for_any_number_of_images(mechanism):
    module = make(mechanism, 8).eval()
    shapes = ({0: torch.export.Dim("batch", max=1 << 24)},)  # without `max`, torch 2.6 compares it with 2⁶³ − 1
    exported = torch.export.export(module, (torch.randn(2, 8, 6, 5),), dynamic_shapes=shapes, strict=False).module()
    for count in (1, 2, 5):
        x = torch.randn(count, 8, 6, 5)
        with torch.no_grad():
            torch.testing.assert_close(exported(x), module(x), atol=1e-5, rtol=1e-4)


class AllMechanisms(nn.Module):
    """Apply every mechanism to the same input: exporting all in one graph saves most of the time."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(make(mechanism, 8) for mechanism in MECHANISMS.values())

    def forward(self, x):
        return tuple(part(x) for part in self.parts)


@needs_onnx_exporter
def test_onnxruntime_matches_torch_for_all_mechanisms(tmp_path):
    import onnxruntime

    module, x = AllMechanisms().eval(), torch.randn(2, 8, 6, 5)
    file = tmp_path / "mechanisms.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the exporter
        torch.onnx.export(module, (x,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    outs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        for name, out, expected in zip(MECHANISMS, outs, module(x), strict=True):
            torch.testing.assert_close(
                torch.from_numpy(out), expected, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
            )
