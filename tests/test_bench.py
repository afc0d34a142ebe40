"""What attention costs here, measured in a short form."""

import re
import time

import pytest
import torch
from rich.console import Console

from visionattn.bench import MECHANISMS, SELF_ATTENTION, _measured, bench
from visionattn.errors import UsageError


def test_ratios_are_those_of_known_costs(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr("visionattn.bench._SECONDS", 50)
    costs = {"one": iter([9, 1, 2, 1, 4, 1, 1]), "three": iter([9, 3, 6, 3, 12, 60, 3])}  # the first is to get warm

    def case(name):
        def run():
            clock[0] += next(costs[name])

        return run

    told = []
    cases = {name: case(name) for name in costs}
    group = _measured("waiting", "one", cases, 6, torch.device("cpu"), lambda: told.append(1))
    assert group.ratios == {"three": 3}
    assert group.seconds == 1
    assert len(told) == 2 * (1 + 5)  # it stops after the round that went beyond the time


def test_every_part_is_measured_and_told_in_80_columns():
    console = Console(record=True, width=80, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        mechanisms, dense, maps, overlays = bench("test_vit", batch_size=1, rounds=1, console=console)
        text = console.export_text()
    assert tuple(mechanisms.ratios) == MECHANISMS
    assert tuple(dense.ratios) == tuple(SELF_ATTENTION)
    assert {"raw", "rollout", "gradcam"} <= maps.ratios.keys()
    assert overlays.ratios["visionattn overlay"] > 0.5
    for group in (mechanisms, dense, maps, overlays):
        assert group.seconds > 0
        assert all(ratio > 0 for ratio in group.ratios.values())
        assert re.search(rf"^ +{group.baseline}: +[\d,.]+ ms +time", text, re.M)
    assert max(map(len, text.splitlines())) <= 80


def test_wrong_calls():
    with pytest.raises(UsageError, match="≥ 1"):
        bench(rounds=0)
    with pytest.raises(UsageError, match="timm has no model 'vit_smal'"):
        bench("vit_smal")
