"""Captures in several threads at the same time, each of which records only its own thread."""

import threading

import torch
import torch.nn.functional as F

from tests.capture import models
from tests.capture.models import kept
from visionattn.capture import FullAttention, capture
from visionattn.maps import GradCAM

close = torch.testing.assert_close


def test_captures_in_two_threads_record_only_their_own_model():
    nets = [models.torchvision_vit(), models.torchvision_vit(), models.vit()]
    batches = [models.pictures(seed=seed) for seed in range(3)]
    expected = [kept(net, images, FullAttention()) for net, images in zip(nets, batches, strict=True)]
    before = models.state_of(nets[0])
    barrier, found, errors = threading.Barrier(3), [[] for _ in nets], []

    def work(index):
        try:
            for _ in range(10):
                barrier.wait(20)
                found[index].append(kept(nets[index], batches[index], FullAttention()))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for reference, rounds in zip(expected, found, strict=True):
        for records in rounds:
            assert len(records) == len(reference)
            for record, reference_record in zip(records, reference, strict=True):
                close(record.weights, reference_record.weights, atol=1e-6, rtol=0)
    models.assert_same_state(before, models.state_of(nets[0]))


def test_overlapping_captures_of_two_threads_restore_the_functions_of_torch():
    originals = (F.scaled_dot_product_attention, F.softmax)
    before = torch.backends.mha.get_fastpath_enabled()
    model, images = models.torchvision_vit(), models.pictures()
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first():
        with torch.no_grad(), capture(model) as records:
            first_in.set()
            second_in.wait(20)
            model(images)
        assert len(records) == 2
        first_out.set()

    def second():
        first_in.wait(20)
        other = models.torchvision_vit()
        with torch.no_grad(), capture(other) as records:
            second_in.set()
            first_out.wait(20)  # the first capture ends while this one is active
            other(images)
        assert len(records) == 2

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (F.scaled_dot_product_attention, F.softmax) == originals
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_calls_in_a_thread_without_a_capture_are_not_recorded():
    model, images = models.vit(), models.pictures()
    with torch.no_grad(), capture(model) as records:
        thread = threading.Thread(target=lambda: model(images))
        thread.start()
        thread.join()
        assert (len(records), records.calls) == (0, 0)
        model(images)
    assert len(records) == 3


def test_a_class_activation_map_does_not_affect_another_thread():
    model, images = models.vit(), models.pictures()
    expected = GradCAM(layer="blocks.1")(model, images).raw
    grad_states = []

    def run_model():
        with torch.no_grad():
            out = model(images + 1)
        grad_states.append((out.requires_grad, torch.is_grad_enabled()))

    def run_thread(module, args, out):
        if not grad_states:
            grad_states.append("started")  # so that the model's call in the thread starts no further thread
            thread = threading.Thread(target=run_model)
            thread.start()
            thread.join()

    handle = model.blocks[2].register_forward_hook(run_thread)
    found = GradCAM(layer="blocks.1")(model, images).raw
    handle.remove()
    assert grad_states[1:] == [(False, True)]
    assert torch.equal(found, expected)
