"""Maps of a trained ViT with planted register neurons, without and with a register (2506.08010).

The network learns the colour of one patch in noise, so the place of the evidence is known. Two neurons are then
planted: they write high norms into patches of the background, to which the class token attends. The last block is
trained further. Takes about a minute of a CPU.
"""

import argparse
import copy
import sys
import warnings
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.maps.planted_registers import attract, inputs_of, plant
from visionattn.errors import MapWarning
from visionattn.maps import METHODS, add_registers, find_artefacts

COLOURS = torch.tensor([[1.5, 0, 0], [0, 1.5, 0], [0, 0, 1.5], [1.5, 1.5, 0]])
NAMES = ("raw", "value_norm", "token_rank", "rollout", "chefer", "legrad", "tokentm")


def pictures(count, seed):
    """Return noise with one coloured patch, (B, 3, 64, 64), the colours (B,) and the patches (B,)."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 3, 64, 64, generator=generator)
    label = torch.randint(0, len(COLOURS), (count,), generator=generator)
    cell = torch.randint(0, 64, (count,), generator=generator)
    for image, colour, row, column in zip(images, COLOURS[label], cell // 8 * 8, cell % 8 * 8, strict=True):
        image[:, row : row + 8, column : column + 8] += colour[:, None, None]
    return images, label, cell


def train(model, steps, seed):
    """Train all parameters that have gradients."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 1e-3)
    for step in range(steps):
        images, label, _ = pictures(64, seed + step)
        loss = F.cross_entropy(model.train()(images), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def silent_neurons(model, images, cell, count=2, block=1):
    """Return the neurons that are least active at the evidence, so that planted high norms lie elsewhere."""
    mlp = model.blocks[block].mlp
    with torch.no_grad():
        values = mlp.fc1(inputs_of(mlp.fc1, model, images))[:, model.num_prefix_tokens :]
    evidence = F.one_hot(cell, values.shape[1]).bool()
    return ((values[evidence].mean(0) - values[~evidence].mean(0)) / values.std((0, 1))).argsort()[:count].tolist()


def row(name, model, images, label, cell):
    """Print the accuracy, the share of high-norm tokens, and the share of maps whose peak lies on the evidence."""
    with torch.no_grad():
        accuracy = float((model(images).argmax(1) == label).float().mean())
    share = float(find_artefacts(model, images).mask.float().mean())
    peaks = [METHODS[method]()(model, images, target=label).raw.flatten(1).argmax(1) for method in NAMES]
    hits = "".join(f"{float((peak == cell).float().mean()):>12.2f}" for peak in peaks)
    print(f"{name:<16}{accuracy:>9.2f}{100 * share:>12.1f}{hits}", flush=True)


def main():
    """Train, plant, and print three rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256, help="test images (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and images (default: 0)")
    options = parser.parse_args()
    warnings.simplefilter("ignore", MapWarning)  # of the high norms
    torch.manual_seed(options.seed)
    size = {"img_size": 64, "patch_size": 8, "depth": 4, "embed_dim": 48, "num_heads": 3}
    clean = train(timm.create_model("vit_tiny_patch16_224", num_classes=len(COLOURS), **size), 300, 1000 * options.seed)
    fitted, _, fitted_cell = pictures(32, 10**6)
    test = pictures(options.images, 10**7)
    print(f"{'':<16}{'accuracy':>9}{'high, %':>12}{''.join(f'{name:>12}' for name in NAMES)}")
    row("as trained", clean, *test)
    planted = plant(copy.deepcopy(clean), fitted, silent_neurons(clean, fitted, fitted_cell))
    attract(planted, fitted)
    for name, weight in planted.named_parameters():  # the attention to the high norms stays
        weight.requires_grad_(
            name.startswith(("blocks.3", "norm", "head")) and "qkv" not in name and "norm1" not in name
        )
    train(planted, 80, 10**5)
    row("planted", planted, *test)
    with add_registers(planted, fitted) as registers:
        row("with a register", planted, *test)
    print(registers)


if __name__ == "__main__":
    main()
