"""Images whose evidence is known, and five small networks that classify them: the data of `judge.py`.

Each image shows a digit among fragments of other digits, 64 × 64 pixels, none of which matters. On top lie square marks
of 12 × 12 pixels, and only these determine the class:

    nothing       decoys alone (diagonal stripes)
    horizontal    one or two marks with horizontal stripes
    vertical      one or two marks with vertical stripes
    together      one mark of each kind: neither mark alone says so

Every image also has one or two decoys, whose contrast is higher than that of the marks. The evidence of an image with a
single mark is this mark, and the evidence of `together` is both marks.
"""

import copy
import io
import math
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from visionattn.data import ClutteredDigits
from visionattn.files import write_file

SIDE, MARK, STRIPE = 64, 12, 2  # pixels: the image, a mark, a stripe of a mark
PLACES = SIDE - MARK + 1  # rows and columns at which a mark may begin
MARK_LEVELS, DECOY_LEVELS = (60, 190), (20, 235)  # of 255: the two brightnesses of the stripes
CLASSES = ("nothing", "horizontal", "vertical", "together")
DIGITS = 4_000  # digits of the training images; the marks on them are new in every step
BATCH, WARM_UP, SAVED, CHECKED = 64, 50, 100, 200  # images in a step; steps of the warm-up, between two saves, checks
VALIDATED = 500  # validation images
GOAL = 0.98  # accuracy


def stripes(kind):
    """Return a mark, (MARK, MARK) uint8: horizontal, vertical or diagonal stripes."""
    row, column = np.mgrid[:MARK, :MARK]
    phase = {"horizontal": row, "vertical": column, "diagonal": row + column}[kind]
    dark, bright = DECOY_LEVELS if kind == "diagonal" else MARK_LEVELS
    return np.where(phase // STRIPE % 2, bright, dark).astype(np.uint8)


class Planted:
    """Draw images with planted evidence. The split, the seed and the number of an image determine the image.

    Args:
        split: train, val or test: of the digits.
        digits: number of different digits on the canvas; the images repeat them with other marks.
    """

    def __init__(self, split, digits):
        self.split, self.digits = split, ClutteredDigits(split, size=digits)

    @cached_property
    def marks(self):
        return {kind: stripes(kind) for kind in ("horizontal", "vertical", "diagonal")}

    def draw(self, number, seed=0, kinds=None):
        """Return an image (64, 64) uint8, its class, and its evidence (marks, 64, 64) bool, a mask for each mark.

        Args:
            number: of the image, ≥ 0.
            seed: of the marks.
            kinds: the kinds of marks that are no decoys (default: of a random class).
        """
        random = np.random.default_rng([seed, ("train", "val", "test").index(self.split), number])
        if kinds is None:
            kinds = [(), ("horizontal",), ("vertical",), ("horizontal", "vertical")][random.integers(4)]
            if len(kinds) == 1 and random.random() < 0.3:
                kinds *= 2
        decoys = int(random.integers(1, 3))
        taken = []
        while len(taken) < len(kinds) + decoys:
            place = random.integers(0, PLACES, 2)
            if all(np.abs(place - other).max() >= MARK for other in taken):
                taken.append(place)
        image = self.digits.draw(number % len(self.digits))[0].copy()
        evidence = np.zeros((len(kinds), SIDE, SIDE), bool)
        for index, (top, left) in enumerate(taken):
            kind = kinds[index] if index < len(kinds) else "diagonal"
            image[top : top + MARK, left : left + MARK] = self.marks[kind]
            evidence[index : index + 1, top : top + MARK, left : left + MARK] = True
        label = 3 if len(set(kinds)) == 2 else 0 if not kinds else 1 + (kinds[0] == "vertical")
        return image, label, evidence

    def batch(self, numbers, seed=0):
        """Return images (B, 3, 64, 64) in [−1, 1] and labels (B,)."""
        drawn = [self.draw(int(number), seed) for number in numbers]
        return to_input([image for image, *_ in drawn]), torch.tensor([label for _, label, _ in drawn])


def to_input(images):
    pixels_BHW = torch.from_numpy(np.stack(images)).float() / 127.5 - 1
    return pixels_BHW[:, None].expand(-1, 3, -1, -1).contiguous()


# Networks ----------------------------------------------------------------------------------------------------------


def gates():
    """Return visionattn's ConvNet with CBAM."""
    from visionattn.attention import CBAM
    from visionattn.models import ConvNet

    return ConvNet(len(CLASSES), widths=(32, 64), depth=2, attention=CBAM)


def densenet():
    """Return a network of torchvision without attention: DenseNet with two blocks, on a grid of 8 × 8."""
    from torchvision.models import DenseNet

    return DenseNet(12, (4, 4), 24, num_classes=len(CLASSES))


def vit():
    """Return a ViT of timm with a class token, on a grid of 8 × 8."""
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=SIDE, patch_size=8, embed_dim=64, depth=6, num_heads=4, mlp_ratio=2, num_classes=len(CLASSES)
    )


def swin():
    """Return a windowed ViT of torchvision: Swin with shifted windows of 4 × 4, on grids of 16 × 16 and 8 × 8."""
    from torchvision.models import SwinTransformer

    return SwinTransformer(
        [4, 4], 32, [2, 2], [2, 4], [4, 4], mlp_ratio=2, stochastic_depth_prob=0.0, num_classes=len(CLASSES)
    )


def vit_mean():
    """Return the same ViT without a class token: the mean over its patches is classified."""
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=SIDE,
        patch_size=8,
        embed_dim=64,
        depth=6,
        num_heads=4,
        mlp_ratio=2,
        num_classes=len(CLASSES),
        class_token=False,
        global_pool="avg",
    )


NETWORKS = {"gates": gates, "densenet": densenet, "vit": vit, "swin": swin, "vit_mean": vit_mean}
STEPS = {"gates": 400, "densenet": 400, "vit": 600, "swin": 400, "vit_mean": 500}
RATE = {"gates": 3e-3, "densenet": 3e-3, "vit": 1e-3, "swin": 2e-3, "vit_mean": 1e-3}


def trained(name, folder, *, seed=0, log=print):
    """Return a trained network in evaluation mode. Weights in `folder` are used again; a killed training goes on.

    Args:
        name: a key of `NETWORKS`.
        folder: where the weights are, or will be saved.
        seed: of the weights and of the training images.
        log: called with lines about the training.
    """
    torch.manual_seed(seed)
    network, path = NETWORKS[name](), Path(folder) / f"{name}-{seed}.pt"
    state = torch.load(path, weights_only=True) if path.exists() else None
    if state is None or not state["done"]:
        _train(network, name, path, state, seed, log)
        state = torch.load(path, weights_only=True)
    network.load_state_dict(state["network"])
    return network.eval()


def _train(network, name, path, state, seed, log):
    """Train with AdamW and a cosine schedule, until the accuracy on validation images is reached, or the steps end."""
    data, (images, labels) = Planted("train", DIGITS), Planted("val", VALIDATED).batch(range(VALIDATED), seed=1)
    optimizer = torch.optim.AdamW(network.parameters(), RATE[name], weight_decay=0.02)
    first, spent = 0, 0.0
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
    last, right = STEPS[name], 0.0
    for step in range(first, last):
        start = time.process_time()
        factor = min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / last))
        for group in optimizer.param_groups:
            group["lr"] = factor * RATE[name]
        random = np.random.default_rng([seed, step])
        x_BCHW, label_B = data.batch(random.integers(0, DIGITS, BATCH), seed=2 + step)
        loss = F.cross_entropy(network.train()(x_BCHW), label_B)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % CHECKED == 0 or step + 1 == last:
            right = accuracy(network, images, labels)
            log(f"{name}: step {step + 1}, loss {loss.detach():.3f}, validation accuracy {right:.3f}, {spent:.0f} s")
        spent += time.process_time() - start
        done = step + 1 == last
        if (step + 1) % SAVED == 0 or done:
            save = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            file = io.BytesIO()
            torch.save(save | {"seconds": spent, "done": done}, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(str(path), file.getvalue())


@torch.no_grad()
def accuracy(network, images, labels):
    """Return the fraction of images that a network in evaluation mode classifies correctly."""
    network = copy.deepcopy(network).eval()
    found = torch.cat([network(part).argmax(1) for part in images.split(100)])
    return float((found == labels).float().mean())
