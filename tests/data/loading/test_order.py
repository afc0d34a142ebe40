"""Test that seed and epoch alone determine the order of training, and that evaluation uses every sample once."""

from collections import Counter
from functools import partial

import numpy as np
import pytest

from visionattn.data.loading.order import Order, RankSampler, weighted_order


def epoch(order, number):
    """Return the (index, augmentation seed) pairs of an epoch."""
    order.set_epoch(number)
    return list(order)


def test_every_epoch_has_its_own_reproducible_order():
    order, same_order = Order(range(20), seed=5), Order(range(20), seed=5)
    first = epoch(order, 0)
    assert sorted(index for index, _ in first) == list(range(20))
    assert epoch(order, 1) != first
    assert epoch(same_order, 1) == epoch(order, 1)  # although same_order has not drawn epoch 0
    assert epoch(Order(range(20), seed=6), 0) != first


def test_augmentation_seed_depends_on_seed_epoch_and_index_only():
    seed_by_index = dict(epoch(Order(range(20), seed=5), 3))
    for rank in range(3):
        of_rank = dict(epoch(Order(range(20), seed=5, rank=rank, world_size=3), 3))
        assert of_rank.items() <= seed_by_index.items()
    assert len(set(seed_by_index.values())) == 20
    assert dict(epoch(Order(range(20), seed=5), 4)) != seed_by_index


@pytest.mark.parametrize("length", [7, 20, 24])
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_processes_together_use_the_batches_of_a_single_process(length, world_size):
    (of_single,) = batches(length, 6, 1)
    by_rank = batches(length, 6 // world_size, world_size)
    for number, batch in enumerate(of_single):
        parts = [of_rank[number] for of_rank in by_rank]
        assert sorted(index for part in parts for index in part) == sorted(batch)
        assert len({len(part) for part in parts}) == 1
    assert all(len(of_rank) == len(of_single) == length // 6 for of_rank in by_rank)


def batches(length, batch_size, world_size):
    """Return for each process a list of its batches, each a list of indices."""
    orders = [
        Order(range(length), seed=5, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    indices = [[index for index, _ in epoch(order, 1)] for order in orders]
    assert [len(part) for part in indices] == list(map(len, orders))
    return [[part[at : at + batch_size] for at in range(0, len(part), batch_size)] for part in indices]


@pytest.mark.parametrize(("length", "world_size"), [(1, 1), (1, 3), (2, 3), (3, 2)])
def test_fewer_images_than_a_batch_form_one_batch(length, world_size):
    by_rank = batches(length, 4, world_size)
    assert [len(of_rank) for of_rank in by_rank] == [1] * world_size
    assert {index for of_rank in by_rank for index in of_rank[0]} == set(range(length))


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_epoch_continues_and_the_next_epoch_is_complete(world_size):
    images_done = iter([12, 0])
    whole = Order(range(20), seed=5, batch_size=2, rank=0, world_size=world_size)
    resumed = Order(range(20), seed=5, batch_size=2, rank=0, world_size=world_size, start=lambda: next(images_done))
    assert epoch(resumed, 3) == epoch(whole, 3)[12 // world_size :]
    assert list(resumed) == epoch(whole, 3)[12 // world_size :]  # a second pass over the same epoch
    assert epoch(resumed, 4) == epoch(whole, 4)
    assert len(resumed) == len(whole)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 13, 17])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_together_evaluate_every_sample_once(length, world_size):
    samplers = [RankSampler(range(length), rank=rank, world_size=world_size) for rank in range(world_size)]
    indices = [index for sampler in samplers if not sampler.starved for index in sampler]
    assert sorted(indices) == list(range(length))
    assert all(len(sampler) == len(list(sampler)) for sampler in samplers)
    assert all(len(sampler) == 1 for sampler in samplers if sampler.starved)


WEIGHTS = np.repeat([1.0, 0.2, 0.02], [4, 10, 36])


def test_weighted_order_draws_each_index_as_often_as_its_weight_says():
    expected = 50 * WEIGHTS / WEIGHTS.sum()
    counts = np.zeros((400, 50))
    for seed in range(400):
        drawn = weighted_order(WEIGHTS, seed)
        assert len(drawn) == 50
        counts[seed] = np.bincount(drawn, minlength=50)
        assert (abs(counts[seed] - expected) < 1).all()
        shares = [counts[seed][weight == WEIGHTS].sum() for weight in (1.0, 0.2, 0.02)]
        np.testing.assert_allclose(shares, [expected[weight == WEIGHTS].sum() for weight in (1.0, 0.2, 0.02)], atol=1)
    error = np.sqrt(0.25 / 400)  # largest standard error of a count that is one of two neighbouring integers
    assert (abs(counts.mean(0) - expected) < 5 * error).all()
    places = np.concatenate([np.flatnonzero(np.array(weighted_order(WEIGHTS, seed)) < 4) for seed in range(400)])
    assert places.mean() == pytest.approx(
        24.5, abs=0.5
    )  # the order is mixed, although equal weights are drawn together


@pytest.mark.parametrize("world_size", [1, 2])
def test_weighted_order_resumes_and_is_shared_among_processes(world_size):
    def order(rank, start=0):
        shuffled = partial(weighted_order, WEIGHTS)
        options = {"rank": rank, "world_size": world_size, "shuffled": shuffled, "start": lambda: start}
        return epoch(Order(range(50), seed=5, batch_size=4 // world_size, **options), 3)

    parts = [order(rank) for rank in range(world_size)]
    (of_single,) = [epoch(Order(range(50), seed=5, batch_size=4, shuffled=partial(weighted_order, WEIGHTS)), 3)]
    assert Counter(pair for part in parts for pair in part) == Counter(of_single)
    assert len(set(of_single)) == len(of_single) > len({index for index, _ in of_single})
    for rank in range(world_size):
        assert order(rank, start=24) == parts[rank][24 // world_size :]
