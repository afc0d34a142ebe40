"""Which sample when: in training from nothing but (seed, epoch), in evaluation every one exactly once."""

from collections.abc import Callable, Iterator, Sized
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

Bits = TypeVar("Bits", int, NDArray[np.uint64])
_ALL = 0xFFFFFFFFFFFFFFFF  # bits that are kept; arrays wrap by themselves


class Order(DistributedSampler[tuple[int, int]]):
    """Yield (index, seed of the augmentation) in a fresh order every epoch.

    The order is f(seed, epoch) and the augmentation's seed f(seed, epoch, index), so that neither depends on worker
    processes or on what was drawn before. Lightning calls `set_epoch`, and leaves a DistributedSampler as it is.

    With several processes each takes every n-th sample. So a batch of all of them together is the same run of the order
    as the batch of one process, and a training may be continued by more or fewer. The images that would not fill a last
    batch are left for other epochs: a batch of one would break batch normalisation. Where all do not fill one batch,
    they are that batch, filled up to a multiple of n by its own beginning.

    Args:
        dataset: what is ordered.
        seed: of the order and of the augmentation.
        batch_size: samples a batch and process.
        rank: which process this is.
        world_size: n, how many there are.
        start: called when an epoch begins: how many samples of all processes lie behind in it.
        shuffled: seed → all indices, in the order of an epoch; any order is as likely by default.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        seed: int,
        batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        start: Callable[[], int] = int,
        shuffled: Callable[[int], list[int]] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, seed=seed)  # type: ignore[arg-type]
        length, together = len(dataset), batch_size * world_size
        self.total_size = length // together * together or -(-length // world_size) * world_size
        self.num_samples = self.total_size // world_size
        self._ask = start
        self._shuffled = shuffled or self._uniform
        self._begun, self._start = -1, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        if epoch != self._begun:
            self._begun, self._start = epoch, self._ask()
        order = self._shuffled(mix(self.seed, epoch))
        order = (order * self.num_replicas)[: self.total_size]
        for index in order[self._start + self.rank :: self.num_replicas]:
            yield index, mix(self.seed, epoch, index)

    def _uniform(self, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(self.dataset), generator=generator).tolist()  # type: ignore[arg-type]


class Share(DistributedSampler[int]):
    """Yield every n-th index, so that n processes see every sample once and none twice.

    Attributes:
        starved: there are fewer samples than processes, and this one has got none. It is given the first of all, of
            which a batch without a sample can be made, so that it takes part where processes wait for each other.
    """

    def __init__(self, dataset: Sized, *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        mine = range(rank, len(dataset), world_size)
        self.starved = not mine and len(dataset) > 0
        self._mine = range(1) if self.starved else mine
        self.num_samples = len(self._mine)

    def __iter__(self) -> Iterator[int]:
        return iter(self._mine)


def mix(*numbers: int) -> int:
    """Hash whole numbers to 63 bits, so that neighbours give unrelated streams."""
    state = 0
    for number in numbers:
        state = scramble(state + number)
    return state >> 1


def scramble(state: Bits) -> Bits:
    """One step of splitmix64: 64 bits to 64 others, of one number or of many at once."""
    bits: Any = state  # NumPy's types tell of Python's numbers what they do not do
    bits = (bits + 0x9E3779B97F4A7C15) & _ALL
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _ALL
    return bits ^ (bits >> 31)
