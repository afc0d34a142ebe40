"""The order of training: which sample when, and with which augmentation, from nothing but (seed, epoch)."""

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import DistributedSampler


class Order(DistributedSampler[tuple[int, int]]):
    """Yield (index, seed of the augmentation) in a fresh order every epoch.

    The order is f(seed, epoch) and the augmentation's seed f(seed, epoch, index), so that neither depends on worker
    processes or on what was drawn before. Lightning calls `set_epoch`, and leaves a DistributedSampler as it is. With
    several processes each takes every n-th sample, after the order was filled up to a multiple of n by its own
    beginning.
    """

    def __init__(self, dataset: Sized, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, seed=seed)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        length = len(self.dataset)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        order = torch.randperm(length, generator=generator).tolist()
        order += order[: self.total_size - length]
        for index in order[self.rank :: self.num_replicas]:
            yield index, _mix(self.seed, self.epoch, index)


def _mix(*numbers: int) -> int:
    """Hash whole numbers to 63 bits (splitmix64's finaliser), so that neighbours give unrelated streams."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
