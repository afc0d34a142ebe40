"""Threads that explain batches, each one of its own, on the cores of a CPU."""

import contextlib
import copy
import dataclasses
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import torch
from torch import nn

from visionattn.maps.base import Method, undisturbed
from visionattn.overlay.job import Explained, Job, Read

Explain: TypeAlias = "Callable[[Sequence[Read]], Future[list[Explained | dict[str, Any]]]]"


@contextlib.contextmanager
def explainers(job: Job) -> Iterator[tuple[int, Explain]]:
    """How many batches are explained at once, and what has one explained: `Job.explain`.

    A forward pass on all cores waits, layer after layer, for the slowest of them, and one or the other reads or draws
    just then. So where the models are on a CPU of several cores, two threads work on half of the cores each. The second
    has models of its own, as some note in themselves what they are at; they share the weights of the first.
    """
    cores, twin = torch.get_num_threads(), _twin(job)
    if twin is None or cores < 2:
        yield 1, lambda batch: _done(job.explain(batch))
        return
    free: queue.SimpleQueue[Job] = queue.SimpleQueue()
    free.put(job)
    free.put(twin)

    def explain(batch: Sequence[Read]) -> list[Explained | dict[str, Any]]:
        one = free.get()
        try:
            return one.explain(batch)
        finally:
            free.put(one)

    with contextlib.ExitStack() as stack:
        for view in job.views:  # else one thread would set the weights that both share free under the other's hands
            stack.enter_context(undisturbed(view.model))
        stack.callback(torch.set_num_threads, cores)
        pool = ThreadPoolExecutor(2, "explain", torch.set_num_threads, (cores // 2,))
        stack.callback(pool.shutdown, cancel_futures=True)
        yield 2, lambda batch: pool.submit(explain, batch)


def _twin(job: Job) -> Job | None:
    """The same job with models of its own; None where they are on no CPU, cannot be copied or were changed by hand, or
    where a method is none of ours, which know of threads."""
    twins: dict[int, nn.Module] = {}
    for view in job.views:
        tensors = [*view.model.parameters(), *view.model.buffers()]
        if not isinstance(view.method, Method) or any(tensor.device.type != "cpu" for tensor in tensors):
            return None
        if any("forward" in vars(module) or module._forward_hooks for module in view.model.modules()):
            return None
        if id(view.model) not in twins:
            try:
                twins[id(view.model)] = copy.deepcopy(view.model, {id(tensor): tensor for tensor in tensors})
            except Exception:  # whatever a stranger's module holds
                return None
    return dataclasses.replace(
        job, views=[dataclasses.replace(view, model=twins[id(view.model)]) for view in job.views]
    )


def _done(result: list[Explained | dict[str, Any]]) -> "Future[list[Explained | dict[str, Any]]]":
    future: Future[list[Explained | dict[str, Any]]] = Future()
    future.set_result(result)
    return future
