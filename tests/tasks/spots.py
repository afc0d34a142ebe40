"""Images with a bright column, and a small glimpse task that classifies its position."""

from functools import partial

import lightning as L
import torch
from torch.utils.data import DataLoader

from visionattn.attention import Gaussian, Retina
from visionattn.models import GlimpseNetwork, MLPEncoder
from visionattn.tasks import GlimpseClassification


def make_task(policy=Gaussian, retina=None, **options):
    """Make a glimpse task with three glimpses and a small network."""
    torch.manual_seed(0)
    network = GlimpseNetwork(
        3, retina=retina or Retina(3), policy=policy, encoder=partial(MLPEncoder, features=8), num_glimpses=3,
        hidden_size=16, glimpse_features=12, where_features=8, in_chans=1,
    )  # fmt: skip
    return GlimpseClassification(network, **options)


class Columns(L.LightningDataModule):
    """A data module of images with a bright column, whose position is the class."""

    class_names = ("left", "middle", "right")

    def __init__(self, count=48):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.samples = []
        for index in range(count):
            image = 0.1 * torch.rand(1, 9, 9, generator=generator)
            image[:, :, index % 3 * 4] += 1
            self.samples.append({"image": image, "label": index % 3})

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=16)

    val_dataloader = test_dataloader = train_dataloader
