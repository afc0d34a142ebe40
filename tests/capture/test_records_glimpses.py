"""Records hold the locations and boxes of glimpses, separately for each call, network and thread."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.maps.glimpses import images, network
from visionattn.attention import Gaussian, Retina
from visionattn.capture import NoWeights, capture

close = torch.testing.assert_close


def test_a_record_of_glimpses_holds_locations_and_boxes_of_each_scale():
    model, x = network(), images()
    with torch.no_grad(), capture(model) as records:
        out = model(x)
        assert len(records) == 1  # records are readable during the capture
    with torch.no_grad():
        rollout = model.rollout(x, locations="mean")
        close(out, model(x), rtol=0, atol=0)
    (record,) = records
    assert (record.name, record.kind, record.grid, record.call) == ("retina", "glimpse", (12, 15), 0)
    close(record.locations, rollout.location, rtol=0, atol=0)
    close(record.boxes, model.retina.boxes(rollout.location, (12, 15)), rtol=0, atol=0)
    assert records.report() == "1 record of 1 call of the model\n  retina: glimpse, 4 at 2 scales in 12×15 pixels"


def test_every_call_and_every_rollout_has_its_own_record():
    model, x = network(), images()
    with torch.no_grad(), capture(model, NoWeights()) as records:
        model(x)
        model(images(9, 9))
        first_rollout = model.rollout(x, rollouts=3, num_glimpses=2)
        second_rollout = model.rollout(x, rollouts=3, num_glimpses=2)
    assert [record.grid for record in records] == [(12, 15), (9, 9), (12, 15), (12, 15)]
    assert [record.call for record in records[:2]] == [0, 1]
    close(records[2].locations, first_rollout.location)
    close(records[3].locations, second_rollout.location)


def test_glimpses_of_other_networks_and_outside_of_capture_are_not_recorded():
    model, other, x = network(), network(), images()
    original_look = Retina.look
    with torch.no_grad(), capture(model, NoWeights()) as records:
        other(x)
        with capture(other, NoWeights()) as inner:
            model(x)
            other(x)
        other(x)
    model(x)
    assert (len(records), len(inner)) == (1, 1)
    assert Retina.look is original_look
    with pytest.raises(RuntimeError, match="enough"), capture(model, NoWeights()):
        raise RuntimeError("enough")
    assert Retina.look is original_look
    assert "look" not in vars(model.retina)


def test_threads_that_capture_the_same_network_record_their_own_glimpses():
    model, barrier = network(), threading.Barrier(2, timeout=60)

    def recorded_grids(x):
        with torch.no_grad(), capture(model, NoWeights()) as records:
            barrier.wait()
            model(x)
            barrier.wait()
        return [record.grid for record in records]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(recorded_grids, (images(12, 15), images(9, 9)))) == [[(12, 15)], [(9, 9)]]
    assert Retina.look.__name__ == "look"
    assert Retina.look.__module__ == Retina.__module__


def test_gradients_flow_through_captured_glimpses():
    model, x = network(subpixel=True, policy=lambda size: Gaussian(size, pathwise=True)), images()
    with capture(model, NoWeights()) as records:
        model(x).square().sum().backward()
    assert model.policy.layers[-1].weight.grad.abs().sum() > 0
    assert not records[0].locations.requires_grad
