"""Test inserted attention under data parallelism: two processes train like one process with all images."""

import copy

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.capture import models
from visionattn.attention import CBAM, TokenMerging, insert, optimizer_for, reduce_tokens

close = torch.testing.assert_close


def with_cbam():
    model = models.vit(depth=2)
    torch.manual_seed(0)
    inserted = insert(model, lambda channels: CBAM(channels, reduction=4), at="blocks", image=torch.zeros(3, 64, 64))
    with torch.no_grad():
        for part in inserted.places.values():
            part.gamma.fill_(0.5)
    return model


def with_fewer_tokens():
    model = models.vit(depth=2)
    reduce_tokens(model, TokenMerging(3))
    return model


def step(model, images, labels):
    optimizer = optimizer_for(model, lambda groups: torch.optim.SGD(groups, lr=0.1))
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


def one_of_two(rank, meeting_place):
    """Run one of the two processes; a failed assertion in it fails the test."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=2)
    images, labels = models.pictures(batch=4), torch.tensor([0, 3, 6, 3])
    mine = slice(2 * rank, 2 * rank + 2)
    for make in (with_cbam, with_fewer_tokens):
        alone = make()
        bare = copy.deepcopy(alone)
        before = copy.deepcopy(alone.state_dict())
        step(alone, images, labels)
        step(DistributedDataParallel(bare), images[mine], labels[mine])
        for name, value in bare.state_dict().items():
            close(value, alone.state_dict()[name], atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        moved = {name for name, value in alone.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == set(dict(alone.named_parameters()))  # including every γ
    torch.distributed.destroy_process_group()


def test_two_processes_train_like_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path / "meeting_place",), nprocs=2)
