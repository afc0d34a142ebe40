"""Test detectors under data parallelism, with two processes, one of which has images without boxes."""

import copy

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.models.detectors.small import batch, dense, query


class Losses(nn.Module):
    """The losses as a forward pass, which DistributedDataParallel requires."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images, boxes, labels):
        return sum(self.detector.losses(images, boxes, labels).values())


def share(rank, step):
    """Return the batch of a process in a step; in the first step the second process has no boxes."""
    images, boxes, labels = batch(2, seed=10 * step + rank)
    if (rank, step) == (1, 0):
        boxes, labels = [x.new_zeros(0, 4) for x in boxes], [x.new_zeros(0) for x in labels]
    return images, boxes, labels


def gradients(network, rank, step):
    torch.manual_seed(rank)  # of the noised queries
    network.zero_grad()
    network.train()(*share(rank, step)).backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in network.named_parameters()}


def one_of_two(rank, meeting_place):
    """Run one of the two processes; a failed assertion in it fails the test."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=2)
    for make in (dense, query):
        torch.manual_seed(0)
        bare = Losses(make())
        alone = [copy.deepcopy(bare), copy.deepcopy(bare)]
        together = DistributedDataParallel(bare)
        for step in range(2):
            expected = [gradients(network, other, step) for other, network in enumerate(alone)]
            for name, found in gradients(together, rank, step).items():
                mean = (expected[0][name] + expected[1][name]) / 2
                torch.testing.assert_close(
                    found, mean, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
                )
    torch.distributed.destroy_process_group()


def test_two_processes_train_detectors_with_averaged_gradients(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path / "meeting_place",), nprocs=2)
