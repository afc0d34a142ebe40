"""The order of samples: in training, (seed, epoch) determines it; evaluation uses every sample exactly once."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

Bits = TypeVar("Bits", bound="int | NDArray[np.uint64]")
_ALL = 0xFFFFFFFFFFFFFFFF  # mask for the low 64 bits of a Python int; uint64 arrays overflow to 64 bits by themselves


class Order(DistributedSampler[tuple[int, int]]):
    """Yield (index, seed of the augmentation) in a new order every epoch.

    (seed, epoch) determines the order, and (seed, epoch, index) determines the augmentation's seed. Neither depends on
    worker processes or on earlier draws. If the order has an index more than once, each repeat has a seed of its own.
    Lightning calls `set_epoch` before each epoch. With several processes, Lightning would replace a sampler that is not
    a DistributedSampler.

    With n processes, each process takes every n-th sample. So n processes together use the same batches as one process
    with n times the batch size, and training can be resumed with another number of processes. Images that do not fill
    the last batch are left out of the epoch, since a batch of one image would break batch normalisation. If the data
    set has fewer images than one batch, they form a smaller batch, and its first images are repeated up to a multiple
    of n.

    Args:
        dataset: only its length is used.
        seed: random seed of the order and of the augmentation.
        batch_size: samples per batch and process.
        rank: number of this process.
        world_size: n, the number of processes.
        start: function called when an epoch begins; returns how many samples of all processes to skip (default: 0).
        shuffled: function from a seed to the indices of one epoch in order, N for a data set of N samples (default:
            every index once, and every order is equally likely).
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
        super().__init__(cast(Dataset[tuple[int, int]], dataset), num_replicas=world_size, rank=rank, seed=seed)
        self.length, together = len(dataset), batch_size * world_size
        self.total_size = self.length // together * together or -(-self.length // world_size) * world_size
        self.num_samples = self.total_size // world_size
        self._ask_start = start
        self._shuffled = shuffled or self._uniform
        self._begun, self._start = -1, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        if epoch != self._begun:
            self._begun, self._start = epoch, self._ask_start()
        order = self._shuffled(mix(self.seed, epoch))
        order = (order * self.num_replicas)[: self.total_size]
        mine = itertools.islice(_numbered(order), self._start + self.rank, None, self.num_replicas)
        for index, repeat in mine:
            yield index, mix(self.seed, epoch, index, *([repeat] if repeat else []))

    def _uniform(self, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self.length, generator=generator).tolist()


def _numbered(order: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield each index, and how often the order had this index before."""
    seen: Counter[int] = Counter()
    for index in order:
        yield index, seen[index]
        seen[index] += 1


def weighted_order(weights_N: NDArray[np.float64], seed: int) -> list[int]:
    """Draw N indices in random order; index i is expected N · weight_i / Σ weights times.

    Systematic sampling draws each index as often as expected, rounded down or up at random, so that an epoch has fewer
    chance repeats than N independent draws. A group of indices with the same weight, such as a class, is drawn in total
    as often as expected, to within one. So each class keeps its share in every epoch.

    Args:
        weights_N: relative frequency of each index, ≥ 0, not all 0.
        seed: determines the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.as_tensor(weights_N, dtype=torch.float64)
    mixed_N = torch.randperm(len(weights), generator=generator)
    order_N = mixed_N[weights[mixed_N].argsort(stable=True)]
    ends_N = (weights[order_N] / weights.sum()).cumsum(0) * len(weights)
    ends_N[-1] = len(weights)  # exactly, so that rounding cannot change the number of indices
    places_N = torch.floor(ends_N + torch.rand(1, generator=generator, dtype=torch.float64)).long()
    drawn = order_N.repeat_interleave(places_N.diff(prepend=places_N.new_zeros(1)))
    return drawn[torch.randperm(len(drawn), generator=generator)].tolist()


class RankSampler(DistributedSampler[int]):
    """Yield every n-th index, so that n processes together use every sample exactly once.

    Attributes:
        starved: True if there are fewer samples than processes and this process has no sample. The sampler then yields
            index 0, and the loader turns this sample into an empty batch. So the process still takes part in collective
            operations.
    """

    def __init__(self, dataset: Sized, *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(cast(Dataset[int], dataset), num_replicas=world_size, rank=rank, shuffle=False)
        mine = range(rank, len(dataset), world_size)
        self.starved = not mine and len(dataset) > 0
        self._mine = range(1) if self.starved else mine
        self.num_samples = len(self._mine)

    def __iter__(self) -> Iterator[int]:
        return iter(self._mine)


def mix(*numbers: int) -> int:
    """Hash integers to 63 bits, so that neighbouring numbers give unrelated random streams."""
    state = 0
    for number in numbers:
        state = scramble(state + number)
    return state >> 1


def scramble(state: Bits) -> Bits:
    """Apply one step of splitmix64 to a 64-bit number, or to each number of an array."""
    bits = cast(int, state)  # arrays work too, but NumPy's type annotations reject the large constants below
    bits = (bits + 0x9E3779B97F4A7C15) & _ALL
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _ALL
    return cast(Bits, bits ^ (bits >> 31))
