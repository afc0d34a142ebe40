"""Test `insert` on many backbones, and write the table in COVERAGE.md:

    python -m tests.attention.insertion.coverage

The backbones are one small model of every family of timm, and models of torchvision. Options make some of the models
smaller, without other changes. CBAM is inserted after every stage, with γ = 0. All weights are random, including those
that timm initialises to zero, since a zero weight would hide the effect of the modules before it.
"""

import copy
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torchvision
from torch import nn

from tests.capture.coverage import MEMBERS as MEMBERS_WITH_ATTENTION
from visionattn.attention import CBAM, insert
from visionattn.errors import UsageError

TABLE = Path(__file__).with_name("COVERAGE.md")

MEMBERS = {  # timm family: model, image size (None: the model's default), options that make the model smaller
    **MEMBERS_WITH_ATTENTION,
    "byoanet": ("botnet26t_256", None, {}),
    "convmixer": ("convmixer_768_32", 112, {}),
    "convnext": ("convnext_atto", 96, {}),
    "densenet": ("densenet121", 96, {}),
    "dla": ("dla46_c", 96, {}),
    "dpn": ("dpn48b", 96, {}),
    "fasternet": ("fasternet_t0", 96, {}),
    "focalnet": ("focalnet_tiny_srf", 96, {}),
    "hrnet": ("hrnet_w18_small", 96, {}),
    "inception_next": ("inception_next_atto", 96, {}),
    "inception_resnet_v2": ("inception_resnet_v2", 160, {}),
    "inception_v3": ("inception_v3", 160, {}),
    "inception_v4": ("inception_v4", 160, {}),
    "mambaout": ("mambaout_femto", 96, {}),
    "mlp_mixer": ("gmixer_12_224", None, {}),
    "nasnet": ("nasnetalarge", 96, {}),
    "pnasnet": ("pnasnet5large", 96, {}),
    "res2net": ("res2net50_48w_2s", 96, {}),
    "resnetv2": ("resnetv2_50", 96, {}),
    "selecsls": ("selecsls42", 96, {}),
    "sequencer": ("sequencer2d_s", None, {}),
    "starnet": ("starnet_s050", 96, {}),
    "vgg": ("vgg11_bn", 96, {}),
    "xception": ("legacy_xception", 96, {}),
    "xception_aligned": ("xception41", 96, {}),
}
TORCHVISION = {  # models of torchvision, and the size of their images
    "resnet18": 96, "mobilenet_v3_small": 96, "efficientnet_b0": 96, "convnext_tiny": 64, "densenet121": 96,
    "regnet_y_400mf": 96, "shufflenet_v2_x0_5": 96, "squeezenet1_1": 96, "vgg11": 96, "swin_t": 96, "maxvit_t": 224,
    "vit_b_32": 224,
}  # fmt: skip


class Row(NamedTuple):
    """One row of the table."""

    family: str
    member: str
    places: str
    same: bool  # the outputs equal those of the original model bit by bit, after strict loading of its weights
    learns: bool  # every γ has a gradient in the first step, and every mechanism has one in the second step
    restored: bool  # a state dict restores the outputs; remove() restores the modules, the keys and the outputs
    reason: str = ""

    @property
    def covered(self) -> bool:
        return bool(self.places) and self.same and self.learns and self.restored


def check_family(family: str) -> Row:
    """Check insertion into the model of a timm family."""
    member, size, options = MEMBERS[family]
    model = timm.create_model(member, **options)
    return check_model(family, member, model, size or model.default_cfg["input_size"][-1])


def check_torchvision_model(member: str) -> Row:
    """Check insertion into a model of torchvision."""
    return check_model("torchvision", member, getattr(torchvision.models, member)(), TORCHVISION[member])


def check_model(family: str, member: str, model: nn.Module, size: int) -> Row:
    """Insert CBAM after every stage, and compare the model with one without CBAM."""
    torch.manual_seed(0)
    image = torch.randn(2, 3, size, size)
    randomise(model, image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad():
            expected = outputs_of(model, image)
        before = copy.deepcopy(model.state_dict())
        tree = [(name, type(module)) for name, module in model.named_modules()]
        try:
            inserted = insert(model, lambda channels: CBAM(channels, reduction=4), image=image[0])
        except UsageError as error:
            return Row(family, member, "", True, False, False, str(error))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in before:
                    parameter.add_(1)
        model.load_state_dict(before, strict=True)
        with torch.no_grad():
            found = outputs_of(model, image)
        same = all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        learns = has_gradients(model, list(inserted.places.values()), image)

        trained = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            trained_outputs = outputs_of(model, image)
            for parameter in model.parameters():
                parameter.add_(1)
        model.load_state_dict(trained, strict=True)
        with torch.no_grad():
            restored = all(torch.equal(*pair) for pair in zip(outputs_of(model, image), trained_outputs, strict=True))
        inserted.remove()
        model.load_state_dict(before, strict=True)
        restored &= tree == [(name, type(module)) for name, module in model.named_modules()]
        restored &= list(before) == list(model.state_dict())
        with torch.no_grad():
            restored &= all(torch.equal(*pair) for pair in zip(outputs_of(model, image), expected, strict=True))
    places = ", ".join(
        f"{name} {part.layout.channels}×{'×'.join(map(str, part.layout.grid))}"
        for name, part in inserted.places.items()
    )
    return Row(family, member, places, same, learns, restored)


def has_gradients(model: nn.Module, parts: list[nn.Module], image: torch.Tensor) -> bool:
    """Return whether only γ has a gradient while γ is 0, and the mechanism has one after a step of γ."""

    def backward() -> None:
        model.zero_grad()
        sum(output.float().square().mean() for output in outputs_of(model, image) if output.requires_grad).backward()

    backward()
    gammas_learn = all(part.gamma.grad is not None and float(part.gamma.grad.abs()) > 0 for part in parts)
    mechanisms_do_not = all(
        not p.grad.any() for part in parts for p in part.mechanism.parameters() if p.grad is not None
    )
    torch.optim.SGD([part.gamma for part in parts], lr=1.0).step()
    with torch.no_grad():
        for part in parts:  # |γ| = 0.1, however small the gradient of γ was
            part.gamma.copy_(part.gamma.sign() * 0.1)
    backward()
    mechanisms_learn = all(
        any(p.grad is not None and p.grad.isfinite().all() and bool(p.grad.any()) for p in part.mechanism.parameters())
        for part in parts
    )
    return gammas_learn and mechanisms_do_not and mechanisms_learn


def randomise(model: nn.Module, image: torch.Tensor) -> None:
    """Add noise to zero weights, and set the statistics of batch normalisations from this image.

    Without these statistics the activations of a random inception_v3 reach 1e21.
    """
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.add_(0.02 * torch.randn_like(parameter))
        momenta = {m: m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
        for module in momenta:
            module.momentum = 1.0
        if momenta:
            model.train()(image)
        for module, momentum in momenta.items():
            module.momentum = momentum
    model.eval()


def outputs_of(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """Return all outputs in evaluation mode. `train` is called first: it drops timm's cached biases."""
    return tensors(model.train().eval()(image))


def tensors(output: object) -> list[torch.Tensor]:
    """Return all tensors in an output."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors(value)]


def table(rows: list[Row]) -> str:
    """Write the table as Markdown."""
    families = [row for row in rows if row.family in MEMBERS]
    covered = [row for row in families if row.covered]
    lines = [
        "# Backbones into which a mechanism can be inserted",
        "",
        f"timm {timm.__version__}, torchvision {torchvision.__version__.partition('+')[0]}. Written by "
        "`python -m tests.attention.insertion.coverage`, whose docstring says how the models were chosen.",
        "",
        f"**{len(covered)} of {len(families)} timm families ({100 * len(covered) / len(families):.0f} %)** accept CBAM "
        "after every stage: weights of the original model load strictly; the outputs are equal bit by bit; the learned "
        "scale γ has a gradient in the first step, and the mechanism has one in the second; a state dict restores the "
        "trained model; and "
        "`remove()` restores the network. CBAM is not inserted where it would not affect the output: after the last "
        "block of a ViT that uses only the class token, and after stages whose maps EfficientViM does not use. CBAM "
        "cannot be inserted between the blocks of SelecSLS, which pass lists, or before the last stage of Hiera, "
        "whose tokens are not in row order until then.",
        "",
        "| family | member | after which module, channels × rows × columns | outputs equal | learns | restored |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        marks = (
            ["yes" if mark else "**no**" for mark in (row.same, row.learns, row.restored)] if row.places else [""] * 3
        )
        cells = row.family, row.member, row.places or f"**not covered**: {row.reason}", *marks
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    rows = []
    for check, names in ((check_family, MEMBERS), (check_torchvision_model, TORCHVISION)):
        for name in sorted(names):
            started = time.perf_counter()
            rows.append(check(name))
            print(f"{time.perf_counter() - started:.0f} s", end=" ")
            print(rows[-1], flush=True)
    TABLE.write_text(table(rows))


if __name__ == "__main__":
    main()
