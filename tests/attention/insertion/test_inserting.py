"""Test insertion: against timm networks with built-in mechanisms, in training, and with invalid arguments."""

import copy
import pickle
from functools import partial

import pytest
import timm
import torch
from torch import nn

from tests.attention.insertion.networks import Blocks, error_of_insert, resnet
from tests.refusals import refuses
from visionattn.attention import CBAM, ECA, SE, insert, optimizer_for
from visionattn.attention.insertion.inserting import Inserted
from visionattn.capture import capture
from visionattn.errors import UsageError
from visionattn.models import ConvNet

small_cbam = partial(CBAM, reduction=4)


def set_gamma(inserted, value=0.5):
    """Set every γ, so that the mechanisms change the outputs."""
    with torch.no_grad():
        for part in inserted.places.values():
            part.gamma.fill_(value)


def test_se_at_branches_of_a_resnet_equals_timms_seresnet():
    torch.manual_seed(0)
    seresnet = timm.create_model("seresnet18", zero_init_last=False).eval()
    model = resnet()
    inserted = insert(model, lambda c: SE(c, reduction=c // max(8, c // 16)), at="branches", preserve=False)
    weights = {}
    for name, tensor in seresnet.state_dict().items():
        block, _, rest = name.partition(".se.")
        weights[f"{block}.bn2.inserted.mechanism.attention.{rest}" if rest else name] = tensor
    model.load_state_dict(weights, strict=True)
    assert list(inserted.places) == [f"layer{stage}.{block}.bn2" for stage in (1, 2, 3, 4) for block in (0, 1)]
    x = torch.randn(2, 3, 64, 96)
    assert torch.equal(model(x), seresnet(x))


@pytest.mark.parametrize("preserve", [True, False])
def test_insertion_after_resnet_stages_matches_a_manual_forward(preserve):
    model = resnet()
    inserted = insert(model, small_cbam, preserve=preserve)
    assert list(inserted.places) == ["layer1", "layer2", "layer3", "layer4"]
    if preserve:
        set_gamma(inserted, 0.3)
    x = torch.randn(2, 3, 64, 96)
    y = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    for name, part in inserted.places.items():
        for block in model.get_submodule(name):
            out = block.bn2(block.conv2(block.act1(block.bn1(block.conv1(y)))))
            y = torch.relu(out + (y if block.downsample is None else block.downsample(y)))
        attended = part.mechanism(y)
        y = y + 0.3 * (attended - y) if preserve else attended
    torch.testing.assert_close(model(x), model.fc(y.mean((2, 3))))


def test_gamma_one_gives_the_mechanism_alone():
    model = resnet()
    without_gamma = copy.deepcopy(model)
    torch.manual_seed(1)
    with_gamma = insert(model, small_cbam, at="blocks")
    set_gamma(with_gamma, 1.0)
    torch.manual_seed(1)
    insert(without_gamma, small_cbam, at="blocks", preserve=False)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), without_gamma(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gamma_zero_keeps_every_value_even_if_the_difference_overflows(dtype):
    model = nn.Sequential(nn.Identity(), nn.Conv2d(3, 3, 1)).to(dtype)
    insert(model, lambda channels: Negation(), at="0", image=torch.zeros(3, 4, 4, dtype=dtype))
    x = torch.tensor([0.0, -0.0, 1.0, -3.14159, 6e4, 6e-8]).to(dtype).repeat(1, 3, 4, 1)
    assert torch.equal(model[0](x), x)


class Negation(nn.Module):
    """Return −x. For large x, the difference −x − x overflows in half precision."""

    def forward(self, x):
        return -x


def test_gamma_zero_keeps_the_networks_gradients():
    original, model = resnet(), resnet()
    insert(model, small_cbam)
    x = torch.randn(2, 3, 64, 64)
    original(x).square().mean().backward()
    model(x).square().mean().backward()
    for name, parameter in original.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad), name


def test_original_weights_load_strictly_and_other_missing_keys_raise():
    model = resnet()
    insert(model, small_cbam)
    original = resnet(1)
    weights = original.state_dict()
    for parent, prefix in ((model, ""), (nn.ModuleDict({"backbone": model}), "backbone.")):
        parent.load_state_dict({prefix + name: tensor for name, tensor in weights.items()}, strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), original(x))
    own = model.state_dict()
    model.load_state_dict(own, strict=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*layer1\.1\.inserted\.gamma"):
        model.load_state_dict({name: t for name, t in own.items() if name != "layer1.1.inserted.gamma"}, strict=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*fc\.bias"):
        model.load_state_dict({name: t for name, t in weights.items() if name != "fc.bias"}, strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**weights, "layer9.weight": weights["fc.bias"]}, strict=True)


def test_remove_restores_the_network():
    model = resnet().train()
    before = copy.deepcopy(model)
    inserted = insert(model, small_cbam, at="blocks")
    assert len(inserted) == 8
    assert str(inserted).startswith("Insertion(layer1.0: CBAM, γ = 0; layer1.1")
    assert all(module.training for module in model.modules())
    inserted.remove()
    inserted.remove()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    for (name, module), original in zip(model.named_modules(), before.modules(), strict=True):
        assert module.__dict__.keys() == original.__dict__.keys(), name
        hooks = [key for key in module.__dict__ if key.endswith("_hooks")]
        assert not any(getattr(module, key) for key in hooks), name
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    refuses(RuntimeError, "Missing key", lambda: model.load_state_dict({}))


def test_error_for_a_network_that_cannot_be_copied_names_a_solution():
    model = timm.create_model("levit_128s").eval()
    model(torch.randn(1, 3, 224, 224))  # caches a table of biases that has a grad_fn, which deepcopy rejects
    assert "cannot be copied" in error_of_insert(model)
    model.train()
    insert(model, SE)


def test_copies_have_their_own_mechanisms():
    model = resnet()
    inserted = insert(model, small_cbam)
    x = torch.randn(2, 3, 64, 64)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        set_gamma(inserted, 0.0)
        expected = model(x)
        set_gamma(inserted, 0.7)
        assert torch.equal(copied(x), expected)
        parts = [part for part in copied.modules() if isinstance(part, Inserted)]
        assert len(parts) == 4
        with torch.no_grad():
            for part in parts:
                part.gamma.fill_(0.7)
        assert torch.equal(copied(x), model(x))
        assert not torch.equal(copied(x), expected)
        copied.load_state_dict(resnet().state_dict(), strict=True)


def test_insertion_compiles_exports_recomputes_and_changes_dtype():
    model = resnet()
    inserted = insert(model, small_cbam)
    set_gamma(inserted)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    model.set_grad_checkpointing()
    model(x).mean().backward()
    assert all(part.gamma.grad is not None for part in inserted.places.values())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, atol=0.1, rtol=0.1)
    assert model.to(torch.float64)(x.double()).dtype == torch.float64


def test_timm_features_include_the_mechanism():
    model = timm.create_model("resnet18", features_only=True, zero_init_last=False).eval()
    x = torch.randn(1, 3, 64, 64)
    before = model(x)
    inserted = insert(model, small_cbam)
    assert list(inserted.places) == ["layer1", "layer2", "layer3", "layer4"]
    assert all(torch.equal(*pair) for pair in zip(model(x), before, strict=True))
    set_gamma(inserted)
    changed = [not torch.equal(*pair) for pair in zip(model(x), before, strict=True)]
    assert changed == [False, True, True, True, True]
    classifier = timm.create_model("resnet18", zero_init_last=False).eval()
    inserted = insert(classifier, small_cbam)
    set_gamma(inserted)
    torch.testing.assert_close(
        classifier.forward_intermediates(x, intermediates_only=True)[-1], classifier.forward_features(x)
    )


def test_capture_records_inserted_gates():
    model = resnet()
    insert(model, small_cbam)
    with torch.no_grad(), capture(model) as records:
        model(torch.randn(1, 3, 64, 96))
    spatial = [record for record in records.gates if record.kind == "spatial_gate"]
    assert [record.grid for record in spatial] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert spatial[-1].name.startswith("layer4.1.inserted.mechanism.")


class NormOf48Groups(nn.Module):
    """A mechanism that cannot be built for 64 channels."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(48, channels)

    def forward(self, x):
        return self.norm(x)


def test_impossible_insertions_raise_and_name_the_place():
    model = resnet()
    assert "no module of this ResNet is named 'layer5'. Nearest: layer" in error_of_insert(model, at="layer5")
    assert "no module of this ResNet is named 'layer4.*.bn9'" in error_of_insert(model, at=["layer4", "layer4.*.bn9"])
    message = error_of_insert(model, NormOf48Groups)
    assert message.startswith("no mechanism can be made for layer1 of this ResNet, 64 channels on 16×16: ")
    assert "must be divisible by num_groups" in message
    assert "must keep the shape; AvgPool2d did not at layer1" in error_of_insert(model, lambda c: nn.AvgPool2d(2))
    assert "nothing can be inserted after fc of this ResNet: it returns a tensor (2, 1000)" in error_of_insert(
        model, at="fc"
    )
    message = error_of_insert(model, image=torch.zeros(4, 64, 64))
    assert message.startswith("this ResNet does not run on an image of 4×64×64 (")
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 2))
    assert "no stages can be found in this Sequential; use names of modules" in error_of_insert(
        flat, image=torch.zeros(3, 2, 2)
    )
    dense = timm.create_model("densenet121").eval()
    assert (
        "no branches can be found in this DenseNet; use at='stages' or at='blocks' or names of modules"
        in error_of_insert(dense, at="branches")
    )
    lists = timm.create_model("crossvit_tiny_240")
    assert "blocks.0 of this CrossVit: it returns a list; name a module inside it" in error_of_insert(
        lists, at="blocks.0"
    )
    twice = nn.Sequential(block := Blocks.block(3), block, nn.Conv2d(3, 3, 1))
    assert "it runs more than once" in error_of_insert(twice, at="0", image=torch.zeros(3, 8, 8))


def test_second_mechanism_at_the_same_place_raises():
    model = resnet()
    inserted = insert(model, SE, at="layer1")
    for at in ("layer1", "layer1.1", "blocks"):
        refuses(UsageError, "has a mechanism inserted already", insert, model, ECA, at=at)
    insert(model, ECA, at="layer1.0")
    inserted.remove()
    insert(model, ECA, at="layer1")


def changes_and_rates(scheduler, factor, count=6):
    """Return the change of γ and of the head's bias in each step, all gradients being 1, and the scheduled rates."""
    model = ConvNet(3, widths=(8,))
    inserted = insert(model, SE)
    optimizer = optimizer_for(model, lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5), gamma_lr_factor=factor)
    schedule = scheduler(optimizer)
    (part,) = inserted.places.values()
    changes, rates = [], []
    for _ in range(count):
        with torch.no_grad():
            part.gamma.fill_(1.0)
            model.head.bias.zero_()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        changes.append((1 - part.gamma.item(), -model.head.bias[0].item()))
        schedule.step()
    return changes, rates


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6, eta_min=0.01),
        lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    ],
    ids=["step", "one cycle", "cosine", "linear"],
)
def test_gamma_has_its_own_rate_and_no_decay_with_every_scheduler(scheduler):
    changes, rates = changes_and_rates(scheduler, 5.0)
    assert len(set(rates)) > 1
    for (gamma, bias), rate in zip(changes, rates, strict=True):
        assert gamma == pytest.approx(5 * rate, abs=1e-6)
        assert bias == pytest.approx(rate, abs=1e-6)


def test_optimizer_without_insertions_has_one_group():
    model = ConvNet(3, widths=(8,))
    optimizer = optimizer_for(model, torch.optim.AdamW)
    assert len(optimizer.param_groups) == 1
    insert(model, SE, preserve=False)
    assert len(optimizer_for(model, torch.optim.AdamW).param_groups) == 1
    refuses(ValueError, "gamma_lr_factor must be > 0", optimizer_for, model, torch.optim.AdamW, gamma_lr_factor=0)
