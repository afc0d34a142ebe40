"""Test that the order of training is a function of seed and epoch."""

import pytest

from visionattn.data.loading.order import Order, RankSampler


def epoch(order, number):
    order.set_epoch(number)
    return list(order)


def test_every_epoch_has_its_own_reproducible_order():
    order, again = Order(range(20), seed=5), Order(range(20), seed=5)
    first = epoch(order, 0)
    assert sorted(index for index, _ in first) == list(range(20))
    assert epoch(order, 1) != first
    assert epoch(again, 1) == epoch(order, 1)  # without epoch 0 before it
    assert epoch(Order(range(20), seed=6), 0) != first


def test_augmentation_seed_depends_on_seed_epoch_and_index_only():
    alone = dict(epoch(Order(range(20), seed=5), 3))
    for rank in range(3):
        shared = dict(epoch(Order(range(20), seed=5, rank=rank, world_size=3), 3))
        assert shared.items() <= alone.items()
    assert len(set(alone.values())) == 20
    assert dict(epoch(Order(range(20), seed=5), 4)) != alone


@pytest.mark.parametrize("length", [7, 20, 24])
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_processes_together_make_the_batches_of_a_single_process(length, world_size):
    (alone,) = batches(length, 6, 1)
    shared = batches(length, 6 // world_size, world_size)
    for number, batch in enumerate(alone):
        parts = [part[number] for part in shared]
        assert sorted(index for part in parts for index in part) == sorted(batch)
        assert len({len(part) for part in parts}) == 1
    assert all(len(part) == len(alone) == length // 6 for part in shared)


def batches(length, batch_size, world_size):
    """Return the indices of each batch, by process."""
    orders = [
        Order(range(length), seed=5, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    indices = [[index for index, _ in epoch(order, 1)] for order in orders]
    assert [len(part) for part in indices] == list(map(len, orders))
    return [[part[at : at + batch_size] for at in range(0, len(part), batch_size)] for part in indices]


@pytest.mark.parametrize(("length", "world_size"), [(1, 1), (1, 3), (2, 3), (3, 2)])
def test_fewer_images_than_a_batch_are_one_batch(length, world_size):
    shared = batches(length, 4, world_size)
    assert [len(part) for part in shared] == [1] * world_size
    assert {index for part in shared for index in part[0]} == set(range(length))


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_epoch_continues_and_the_next_starts_at_its_beginning(world_size):
    behind = iter([12, 0])
    whole = Order(range(20), seed=5, batch_size=2, rank=0, world_size=world_size)
    rest = Order(range(20), seed=5, batch_size=2, rank=0, world_size=world_size, start=lambda: next(behind))
    assert epoch(rest, 3) == epoch(whole, 3)[12 // world_size :]
    assert list(rest) == epoch(whole, 3)[12 // world_size :]  # iterated again in the same epoch
    assert epoch(rest, 4) == epoch(whole, 4)
    assert len(rest) == len(whole)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 13, 17])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_together_have_every_sample_once(length, world_size):
    shares = [RankSampler(range(length), rank=rank, world_size=world_size) for rank in range(world_size)]
    taken = [index for share in shares if not share.starved for index in share]
    assert sorted(taken) == list(range(length))
    assert all(len(share) == len(list(share)) for share in shares)
    assert all(len(share) == 1 for share in shares if share.starved)
