"""The order of training is a function of seed and epoch."""

from visionattn.data.order import Order


def epoch(order, number):
    order.set_epoch(number)
    return list(order)


def test_every_epoch_has_its_own_order_and_the_same_in_every_run():
    order, again = Order(range(20), seed=5), Order(range(20), seed=5)
    first = epoch(order, 0)
    assert sorted(index for index, _ in first) == list(range(20))
    assert epoch(order, 1) != first
    assert epoch(again, 1) == epoch(order, 1)  # without having lived through epoch 0
    assert epoch(Order(range(20), seed=6), 0) != first


def test_the_seed_of_an_augmentation_knows_only_seed_epoch_and_index():
    alone = dict(epoch(Order(range(20), seed=5), 3))
    for rank in range(3):
        shared = dict(epoch(Order(range(20), seed=5, rank=rank, world_size=3), 3))
        assert shared.items() <= alone.items()
    assert len(set(alone.values())) == 20
    assert dict(epoch(Order(range(20), seed=5), 4)) != alone


def test_processes_share_the_work():
    parts = [epoch(Order(range(20), seed=5, rank=rank, world_size=3), 0) for rank in range(3)]
    assert [len(part) for part in parts] == [7, 7, 7]
    assert {index for part in parts for index, _ in part} == set(range(20))
