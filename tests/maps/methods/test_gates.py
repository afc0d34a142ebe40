"""A recorded gate times the module's input is the module's output; heatmaps show spatial gates."""

import pytest
import timm
import torch
import torchvision
from timm.layers import create_attn
from torch import nn

from tests.capture import models
from visionattn.attention import CBAM, ECA, SE
from visionattn.capture import NoWeights, capture
from visionattn.errors import UsageError
from visionattn.maps import Gate, GradCAM

close = torch.testing.assert_close


def captured(model, images):
    with torch.no_grad(), capture(model, NoWeights()) as records:
        out = model(images)
    return records, out


def with_convolution(mechanism):
    torch.manual_seed(0)
    return models.randomised(nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), mechanism))


SINGLE = {
    "timm se": lambda: create_attn("se", 16),
    "timm ese": lambda: create_attn("ese", 16),
    "timm eca": lambda: create_attn("eca", 16),
    "timm ceca": lambda: create_attn("ceca", 16),
    "torchvision se": lambda: torchvision.ops.SqueezeExcitation(16, 4),
    "torchvision se, hard": lambda: torchvision.ops.SqueezeExcitation(16, 4, scale_activation=nn.Hardsigmoid),
    "own se": lambda: SE(16, reduction=4),
    "own eca": lambda: ECA(16),
}


@pytest.mark.parametrize("mechanism", SINGLE)
def test_recorded_channel_gates_are_the_factors_of_the_input(mechanism):
    model, images = with_convolution(SINGLE[mechanism]()), models.pictures(16, batch=3)
    records, out = captured(model, images)
    assert [(record.kind, record.grid) for record in records] == [("channel_gate", (1, 1))]
    assert records[0].name.startswith("1.")
    assert records[0].weights.shape == (3, 16, 1, 1)
    with torch.no_grad():
        close(model[0](images) * records[0].weights, out)


@pytest.mark.parametrize("mechanism", [lambda: create_attn("cbam", 16, rd_ratio=0.5), lambda: CBAM(16, reduction=4)])
def test_cbam_is_its_channel_gate_times_its_spatial_gate(mechanism):
    model, images = with_convolution(mechanism()), models.pictures((16, 24), batch=3)
    records, out = captured(model, images)
    assert [(record.kind, record.grid) for record in records] == [("channel_gate", (1, 1)), ("spatial_gate", (8, 12))]
    with torch.no_grad():
        close(model[0](images) * records[0].weights * records[1].weights, out)
    maps = Gate()(model, images)
    close(maps.raw, records[1].weights[:, 0])
    assert maps.source == f"gate of {records[1].name.rpartition('.')[0]}"


@pytest.mark.parametrize("name", ["seresnet18", "ecaresnet26t", "legacy_seresnet18"])
def test_every_gate_of_a_timm_network_is_recorded(name):
    model = models.resnet(name)
    mechanisms = [n for n, m in model.named_modules() if type(m).__name__ in ("SEModule", "EcaModule")]
    records, _ = captured(model, models.pictures())
    assert len(mechanisms) >= 8
    assert [record.name.rpartition(".")[0] for record in records.gates] == mechanisms


def test_every_gate_of_torchvisions_mobilenet_is_recorded():
    model = models.randomised(torchvision.models.mobilenet_v3_small())
    mechanisms = [n for n, m in model.named_modules() if type(m).__name__ == "SqueezeExcitation"]
    records, _ = captured(model, models.pictures())
    assert [record.name for record in records] == [f"{name}.scale_activation" for name in mechanisms]


def cbam_resnet():
    return models.resnet("resnet10t", block_args={"attn_layer": "cbam"})


def test_a_layer_may_be_a_gate_or_a_module_around_it():
    model, images = cbam_resnet(), models.pictures(96)
    records, _ = captured(model, images)
    spatial = {record.name: record.weights[:, 0] for record in records if record.kind == "spatial_gate"}
    last, early = list(spatial)[-1], next(name for name in spatial if name.startswith("layer2"))
    close(Gate()(model, images).raw, spatial[last])
    close(Gate(early)(model, images).raw, spatial[early])
    close(Gate("layer2")(model, images).raw, spatial[early])


def test_gates_along_rows_and_columns_are_multiplied():
    class RowsAndColumns(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.columns, self.gate = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.Sigmoid()

        def forward(self, x):
            return x * self.gate(self.rows(x.mean(3, keepdim=True))) * self.gate(self.columns(x.mean(2, keepdim=True)))

    model, images = with_convolution(RowsAndColumns()), models.pictures((16, 24))
    with torch.no_grad():
        expected = (model(images) / model[0](images)).mean(1)
    close(Gate()(model, images).raw, expected, atol=1e-5, rtol=1e-3)


class OverColumns(nn.Module):
    """A gate (B, 1, 1, W), the same for every channel and row."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(1, 1, (1, 3), padding=(0, 1)), nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.conv(x.mean((1, 2), keepdim=True)))


class ChannelsLast(nn.Module):
    """A gate (B, 1, 1, C)."""

    def __init__(self):
        super().__init__()
        self.fc, self.gate = nn.Linear(16, 16), nn.Sigmoid()

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return (x * self.gate(self.fc(x.mean((1, 2), keepdim=True)))).permute(0, 3, 1, 2)


def test_a_gate_over_columns_is_recorded_as_a_spatial_gate():
    model, images = with_convolution(OverColumns()), models.pictures(32)
    for net in (model, nn.Sequential(model)):
        records, out = captured(net, images)
        assert [(record.kind, record.grid) for record in records] == [("spatial_gate", (1, 16))]
        with torch.no_grad():
            close(model[0](images) * records[0].weights, out)
    close(Gate()(model, images).raw, records[0].weights[:, 0])


def test_a_channel_gate_with_channels_last_is_recorded_as_a_channel_gate():
    model, images = with_convolution(ChannelsLast()), models.pictures(32)  # 16 columns and 16 channels
    records, out = captured(model, images)
    assert [(record.kind, record.grid) for record in records] == [("channel_gate", (1, 1))]
    with torch.no_grad():
        close(model[0](images) * records[0].weights, out)


def test_a_gate_with_channels_and_positions_is_shown_as_its_mean_over_channels():
    class Pixelwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate = nn.Conv2d(16, 16, 1), nn.Sigmoid()

        def forward(self, x):
            return x * self.gate(self.conv(x))

    model, images = with_convolution(Pixelwise()), models.pictures(16)
    with torch.no_grad():
        expected = torch.sigmoid(model[1].conv(model[0](images)))
    for b, i, j in ((0, 0, 0), (1, 3, 5), (1, 7, 7)):
        value = sum(float(expected[b, c, i, j]) for c in range(16)) / 16
        assert float(Gate()(model, images).raw[b, i, j]) == pytest.approx(value, abs=1e-6)


def test_channel_gates_alone_are_an_error_that_names_methods_that_fit():
    model = models.resnet("seresnet18")
    with pytest.raises(UsageError, match=r"has gates over channels only\. Methods that fit: .*gradcam") as caught:
        Gate()(model, models.pictures())
    assert "gate," not in str(caught.value).partition("fit:")[2]
    GradCAM()(model, models.pictures())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (models.resnet, r"this ResNet has none\. Methods that fit: .*gradcam.*layercam"),
        (models.vit, r"this VisionTransformer has attention and no gates\. Methods that fit: dino, raw, rollout"),
    ],
)
def test_a_model_without_gates_is_an_error_that_names_methods_that_fit(make, message):
    with pytest.raises(UsageError, match=message):
        Gate()(make(), models.pictures())


def test_the_error_for_a_wrong_name_of_a_gate_names_the_nearest():
    model = cbam_resnet()
    with pytest.raises(
        UsageError, match=r"no spatial gate in 'layer3\.0\.se\.spatia'\. Nearest: layer3\.0\.se\.spatial\.gate"
    ):
        Gate("layer3.0.se.spatia")(model, models.pictures(96))


def test_gates_and_attention_of_one_model_are_both_recorded():
    model = models.randomised(timm.create_model("maxvit_tiny_tf_224", depths=(1,), embed_dim=(32,), stem_width=16))
    records, _ = captured(model, models.pictures(224))
    assert {record.kind for record in records} == {"self", "channel_gate"}
    assert len(records) == len(records.attention) + len(records.gates)
