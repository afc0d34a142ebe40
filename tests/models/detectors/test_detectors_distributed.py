"""Test data-parallel training of detectors in two processes, one of which has a batch without boxes."""

import copy

import torch
import torch.distributed
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from tests.models.detectors.small import batch, dense, query


class Losses(nn.Module):
    """The losses as a forward pass, which DistributedDataParallel requires."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images, boxes, labels):
        return sum(self.detector.losses(images, boxes, labels).values())


def batch_of(rank, step):
    """Return the batch of a process in a step; in the first step the second process has no boxes."""
    images, boxes, labels = batch(2, seed=10 * step + rank)
    if (rank, step) == (1, 0):
        boxes, labels = [x.new_zeros(0, 4) for x in boxes], [x.new_zeros(0) for x in labels]
    return images, boxes, labels


def gradients(network, rank, step):
    torch.manual_seed(rank)  # for the random noise of the noised queries
    network.zero_grad()
    network.train()(*batch_of(rank, step)).backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in network.named_parameters()}


def run_one_process(rank, rendezvous_file):
    """Train in one of two processes; `start_processes` raises a failure of this function in the test."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous_file}", rank=rank, world_size=2)
    for make in (dense, query):
        torch.manual_seed(0)
        bare = Losses(make())
        single_process = [copy.deepcopy(bare), copy.deepcopy(bare)]
        parallel = DistributedDataParallel(bare)
        for step in range(2):
            expected = [gradients(network, index, step) for index, network in enumerate(single_process)]
            for name, found in gradients(parallel, rank, step).items():
                mean = (expected[0][name] + expected[1][name]) / 2
                torch.testing.assert_close(
                    found, mean, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
                )
    torch.distributed.destroy_process_group()


def test_two_processes_train_detectors_with_averaged_gradients(tmp_path):
    start_processes(run_one_process, (tmp_path / "rendezvous",), nprocs=2, start_method="forkserver")
