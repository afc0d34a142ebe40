"""A replacement for MNIST that needs no download."""

import numpy as np
import torch
import torchvision


class FakeMNIST(torchvision.datasets.VisionDataset):
    """Random pixels with the interface of torchvision's MNIST."""

    classes = [f"{number} - name" for number in range(10)]  # noqa: RUF012

    def __init__(self, root, train=True, download=False):
        count = 600 if train else 100
        self.data = torch.from_numpy(np.random.default_rng(int(train)).integers(0, 256, (count, 28, 28), np.uint8))
        self.targets = torch.arange(count) % 10

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return torchvision.transforms.functional.to_pil_image(self.data[index]), int(self.targets[index])
