"""A detector that returns given predictions, a data module of given samples, and a trainer that writes no files."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.shapes import NAMES
from visionattn.data.placement import Placement
from visionattn.data.samples import collate
from visionattn.models import Detector


class Samples(L.LightningDataModule):
    """A data module with the same detection samples in every split."""

    def __init__(self, samples, class_names=NAMES, batch_size=4):
        super().__init__()
        self.samples, self.class_names, self.batch_size = samples, class_names, batch_size

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=self.batch_size, collate_fn=collate)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def sample(number, boxes, labels, placement=None, crowd=None, area=None, image=None):
    """Make a sample from boxes in pixels of a 64 × 64 input; by default a black image without crowds."""
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "image": torch.zeros(3, 64, 64) if image is None else image,
        "boxes": boxes,
        "labels": torch.as_tensor(labels, dtype=torch.long),
        "crowd": torch.zeros(len(boxes), dtype=torch.bool) if crowd is None else torch.tensor(crowd),
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(1) if area is None else torch.tensor(area),
        "image_id": number,
        "path": f"{number}.png",
        "placement": placement or Placement.identity((64, 64)),
    }


class Oracle(Detector):
    """A detector that returns the given predictions one after the other, and losses of the given terms."""

    def __init__(self, answers=(), num_classes=4, terms=None):
        super().__init__()
        self.num_classes = num_classes
        self.answers = list(answers)
        self.terms = terms or {"one": 1.0, "two": 2.0}
        self.weight = nn.Parameter(torch.ones(()))
        self.loss_calls = []  # the arguments of each call of `losses`

    def forward(self, images):
        return [self.answers.pop(0) for _ in images]

    def losses(self, images, boxes, labels):
        self.loss_calls.append((images, boxes, labels))
        return {name: self.weight * value for name, value in self.terms.items()}


def trainer(**options):
    no_output = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(
        **{"enable_model_summary": False, "max_epochs": 1, "num_sanity_val_steps": 0, **no_output, **options}
    )
