"""Test data-parallel training with inserted attention: two processes give the same weights as one process."""

import copy

import torch
import torch.distributed
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from tests.capture import models
from visionattn.attention import CBAM, TokenMerging, insert, optimizer_for, reduce_tokens

close = torch.testing.assert_close


def vit_with_cbam():
    model = models.vit(depth=2)
    torch.manual_seed(0)
    inserted = insert(model, lambda channels: CBAM(channels, reduction=4), at="blocks", image=torch.zeros(3, 64, 64))
    with torch.no_grad():
        for part in inserted.places.values():
            part.gamma.fill_(0.5)
    return model


def vit_with_merged_tokens():
    model = models.vit(depth=2)
    reduce_tokens(model, TokenMerging(3))
    return model


def step(model, images, labels):
    """Train for one step."""
    optimizer = optimizer_for(model, lambda groups: torch.optim.SGD(groups, lr=0.1))
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


def compare_with_one_process(rank, meeting_place):
    """Train with half of the images in this process, and compare with a training on all images."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=2)
    images, labels = models.pictures(batch=4), torch.tensor([0, 3, 6, 3])
    half = slice(2 * rank, 2 * rank + 2)
    for make in (vit_with_cbam, vit_with_merged_tokens):
        single = make()
        parallel = copy.deepcopy(single)
        before = copy.deepcopy(single.state_dict())
        step(single, images, labels)
        step(DistributedDataParallel(parallel), images[half], labels[half])
        for name, value in parallel.state_dict().items():
            close(value, single.state_dict()[name], atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        changed = {name for name, value in single.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == set(dict(single.named_parameters()))  # including every γ
    torch.distributed.destroy_process_group()


def test_two_processes_train_like_one(tmp_path):
    start_processes(compare_with_one_process, (tmp_path / "meeting_place",), nprocs=2, start_method="forkserver")
