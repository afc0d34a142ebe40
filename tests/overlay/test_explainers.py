"""Two batches at once: the maps are those of one after the other, and the models are left as they were."""

import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from tests.overlay.test_export import bright, manifest, photos
from visionattn.data.placement import Preprocess
from visionattn.maps.cam import GradCAM
from visionattn.overlay.explainers import explainers
from visionattn.overlay.export import export
from visionattn.overlay.views import View


class Forgetful(nn.Module):
    """It keeps in itself what it works on; another thread inside it would change that."""

    threads: set[int] = set()  # noqa: RUF012 - of all copies

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x_BCHW):
        self.threads.add(threading.get_ident())
        self.seen = x_BCHW
        time.sleep(0.02)
        return self.head(4 * F.relu(self.conv(self.seen)).mean((2, 3)))


@pytest.fixture
def two_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def heats(out):
    return [np.load(path)["heatmap"] for path in sorted(out.glob("*.npz"))]


def test_two_threads_find_what_one_finds(two_cores, tmp_path):
    model = Forgetful().train()
    model.conv.bias.requires_grad_(False)
    view = View(model, Preprocess(16), GradCAM())
    inputs, found = [photos(tmp_path / "in", 12)], []
    for cores in (1, 2):
        torch.set_num_threads(cores)
        Forgetful.threads.clear()
        out = tmp_path / str(cores)
        export(inputs, out, view, save=["array"], batch_size=4, workers=2, console=Console(quiet=True))
        assert len(Forgetful.threads) == cores
        assert torch.get_num_threads() == cores
        found.append((heats(out), [entry["probability"] for entry in manifest(out).values()]))
    for one, two in zip(*(heats for heats, _ in found), strict=True):
        np.testing.assert_allclose(two, one, atol=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-5)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True, True]


def test_one_thread_where_two_might_disturb_each_other(two_cores, tmp_path):
    def count(model, method):
        return _count([View(model, Preprocess(16), method)])

    assert count(Forgetful(), GradCAM()) == 2
    assert count(Forgetful(), bright) == 1  # a method of a stranger
    hooked = Forgetful()
    hooked.conv.register_forward_hook(lambda *_: None)
    assert count(hooked, GradCAM()) == 1
    changed = Forgetful()
    changed.conv.forward = lambda x_BCHW: x_BCHW
    assert count(changed, GradCAM()) == 1
    unlike = Forgetful()
    unlike.lock = threading.Lock()  # cannot be copied
    assert count(unlike, GradCAM()) == 1
    torch.set_num_threads(1)
    assert count(Forgetful(), GradCAM()) == 1


def _count(views):
    from visionattn.overlay.job import Job
    from visionattn.overlay.render import Style

    job = Job(views, False, ("overlay",), None, Style(), 1, "", "")
    with explainers(job) as (count, _):
        return count
