"""Test the insertion points: stages, blocks and branches of networks, grids of tokens, channels-last maps."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from tests.attention.insertion.networks import Blocks, error_of_insert, resnet
from visionattn.attention import ECA, SE, insert
from visionattn.errors import UsageError
from visionattn.models import ConvNet


class Mark(nn.Module):
    """A mechanism that adds one to the cell in row 1, column 2, and stores its input."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        self.input = x.detach()
        marked = torch.zeros_like(x)
        marked[:, :, 1, 2] = 1
        return x + marked


def shapes_of(inserted):
    """Return {place: (channels, grid)}."""
    return {name: (part.layout.channels, part.layout.grid) for name, part in inserted.places.items()}


def test_tokens_are_arranged_on_their_grid_and_prefix_tokens_pass():
    model = timm.create_model("test_vit", img_size=(48, 80), reg_tokens=3).eval()  # one class token, three registers
    names = ["blocks.0", "blocks.3"]
    inserted = insert(model, Mark, at=names, preserve=False)
    assert shapes_of(inserted) == dict.fromkeys(names, (64, (3, 5)))
    tokens = {}
    model.blocks[0].register_forward_hook(lambda module, args, out: tokens.setdefault("after", out))
    part = inserted.places["blocks.0"]
    model.blocks[0].register_forward_pre_hook(lambda module, args: tokens.setdefault("before", args[0]))
    x = torch.randn(2, 3, 48, 80)
    model(x)
    without_hooks = copy.deepcopy(model)
    without_hooks.blocks[0]._forward_hooks.clear()
    before = without_hooks.blocks[0](tokens["before"])
    expected = torch.zeros_like(before)
    expected[:, 4 + 1 * 5 + 2] = 1  # 4 prefix tokens, then row 1, column 2 of a 3 × 5 grid
    torch.testing.assert_close(tokens["after"] - before, expected)
    # cell [1, 2] of the mechanism's input is the projection of patch (1, 2) of the image
    patches = model.patch_embed(x)
    model_with_embedding = timm.create_model("test_vit", img_size=(48, 80), reg_tokens=3).eval()
    embedding = insert(model_with_embedding, Mark, at="patch_embed", preserve=False)
    model_with_embedding.patch_embed.load_state_dict(model.patch_embed.state_dict())
    model_with_embedding(x)
    cell = model.patch_embed.norm(model.patch_embed.proj(x[:, :, 16:32, 32:48]).flatten(1))
    torch.testing.assert_close(embedding.places["patch_embed"].mechanism.input[:, :, 1, 2], cell)
    torch.testing.assert_close(patches[:, 1, 2], cell)
    assert part.layout.num_prefix_tokens == 4


def test_channels_last_maps_are_permuted():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", depths=(1, 1), img_size=112, embed_dim=24, num_heads=(1, 2)
    )
    model.eval()
    inserted = insert(model, Mark, preserve=False)
    assert shapes_of(inserted) == {"layers.0": (24, (28, 28)), "layers.1": (48, (14, 14))}
    outputs = []
    model.layers[0].register_forward_hook(lambda module, args, out: outputs.append(out))
    model(torch.randn(1, 3, 112, 112))
    part = inserted.places["layers.0"]
    before = part.mechanism.input.permute(0, 2, 3, 1)
    marked = torch.zeros_like(before)
    marked[:, 1, 2] = 1
    torch.testing.assert_close(outputs[0], before + marked)


def test_stages_match_timms_feature_info():
    for name in ("resnet18", "convnext_atto", "efficientnet_b0", "regnety_002", "mnasnet_small", "pvt_v2_b0"):
        model = timm.create_model(name)
        listed = [(level["num_chs"], 64 // level["reduction"]) for level in model.feature_info][-4:]
        inserted = insert(model, SE, image=torch.zeros(3, 64, 64))
        found = [(channels, grid[0]) for channels, grid in shapes_of(inserted).values()][-4:]
        assert found == listed, name


def test_insertion_points_of_torchvision_timm_and_custom_networks():
    image = torch.zeros(3, 64, 64)
    model = torchvision.models.resnet18()
    assert list(insert(model, SE, image=image).places) == ["layer1", "layer2", "layer3", "layer4"]
    model = torchvision.models.resnet50()
    blocks = [f"layer{stage + 1}.{block}" for stage, depth in enumerate((3, 4, 6, 3)) for block in range(depth)]
    assert list(insert(model, SE, at="branches", image=image).places) == [f"{name}.bn3" for name in blocks]
    assert list(insert(model, SE, at="blocks", image=image).places) == blocks
    model = ConvNet(5, widths=(16, 32), depth=2)
    assert list(insert(model, SE, at="stages").places) == ["blocks.1", "blocks.3"]
    assert list(insert(model, SE, at="branches").places) == [f"blocks.{block}.branch" for block in range(4)]
    model = Blocks()
    assert shapes_of(insert(model, SE, image=torch.zeros(4, 24, 40))) == {
        "stage1": (8, (12, 20)),
        "stage2": (12, (6, 10)),
    }
    model = torchvision.models.vgg11_bn()
    assert shapes_of(insert(model, SE, image=image))["features.27"] == (512, (4, 4))  # the last ReLU before the pooling
    model = timm.create_model("vit_tiny_patch16_224", img_size=64)
    # block 11 is left out: after it only the class token is used
    assert list(insert(model, SE).places) == ["blocks.2", "blocks.5", "blocks.8"]
    branches = insert(model, SE, at="branches")
    assert list(branches.places)[:2] == ["blocks.0.attn", "blocks.0.mlp"]


def test_star_matches_one_part_of_a_name():
    model = resnet()
    assert list(insert(model, SE, at="layer4.*.bn2").places) == ["layer4.0.bn2", "layer4.1.bn2"]
    assert list(insert(model, ECA, at=["layer[34].1", "layer1"]).places) == ["layer1", "layer3.1", "layer4.1"]


def test_insert_leaves_cached_biases_and_outputs_unchanged():
    model = timm.create_model("levit_128s").eval()  # caches a table of biases in evaluation mode
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = model(x)
        model.train().eval()
        insert(model, SE)
        assert torch.equal(model(x), expected)


def test_larger_images_have_larger_grids_of_the_same_aspect_ratio():
    model = timm.create_model("test_vit", img_size=(48, 80), dynamic_img_size=True).eval()
    inserted = insert(model, Mark, at="blocks", preserve=False)
    model(torch.randn(1, 3, 96, 160))
    assert {part.mechanism.input.shape[2:] for part in inserted.places.values()} == {(6, 10)}
    with pytest.raises(UsageError, match=r"images with the aspect ratio of 48×80, but this batch has 80×48; .*image="):
        model(torch.randn(1, 3, 80, 48))
    with pytest.raises(UsageError, match="do not form a grid with the aspect ratio of 3×5"):
        model.forward_features(torch.randn(1, 3, 48, 96))


def test_tokens_that_are_not_in_row_order_raise():
    model = timm.create_model("hiera_tiny_224", img_size=(64, 64))
    assert "is not a feature map in row order" in error_of_insert(model, at="blocks.0", image=torch.zeros(3, 64, 64))
