"""Random images with random labels, a linear network, and a trainer that writes no files."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader


class Points(L.LightningDataModule):
    """A data module with the same images and labels in every split."""

    def __init__(self, images, labels, classes=4, counts=None, batch_size=8):
        super().__init__()
        self.samples = [{"image": x, "label": int(y)} for x, y in zip(images, labels, strict=True)]
        self.class_names = [str(number) for number in range(classes)]
        self.class_counts = counts
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=self.batch_size)

    val_dataloader = test_dataloader = train_dataloader


def points(count=24, classes=4):
    """Make random images (count, classes, 6, 6), and random labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, classes, 6, 6, generator=generator)
    return images, torch.randint(0, classes, (count,), generator=generator)


class Linear(nn.Module):
    """A linear map from the mean of each channel to logits."""

    num_classes = 4

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x.mean((2, 3)))


def trainer(**options):
    no_output = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{"enable_model_summary": False, "max_epochs": 1, **no_output, **options})
