"""Any sequence of changes to one model in one process gives the results of a model that was built in that state.

`pytest` runs the sequences that fit 15 seconds. More, in batches that continue after an interruption:

    python -m tests.test_sequences 2000 --done sequences.txt
"""

import argparse
import copy
import functools
import json
import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import hypothesis.strategies as st
import lightning as L
import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader

from visionattn.attention import (
    CBAM,
    ECA,
    Neighbourhood,
    TokenMerging,
    TokenPruning,
    Windowed,
    insert,
    reduce_tokens,
    swap_attention,
)
from visionattn.capture import FullAttention, capture, survey_images
from visionattn.data import Preprocess
from visionattn.errors import UsageError
from visionattn.maps import METHODS
from visionattn.overlays import Explainer, export
from visionattn.tasks import Classification

SIZE, CLASSES = 32, 3
SLOW = {name for name, method in METHODS.items() if "many" in method.cost or "pass a" in method.cost}
METHODS_TO_USE = sorted(set(METHODS) - SLOW - {"gaze"})  # gaze needs a retina


def build_vit():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=CLASSES
    )


def build_resnet():
    return timm.create_model("test_resnet", num_classes=CLASSES)


def insert_into(mechanism, at, preserve):
    def change(model):
        return insert(model, mechanism, at=at, preserve=preserve, image=torch.zeros(3, SIZE, SIZE))

    return change


CHANGES = {
    "insert CBAM after blocks": insert_into(CBAM, "blocks", True),
    "insert ECA after blocks": insert_into(ECA, "blocks", False),
    "insert ECA in branches": insert_into(ECA, "branches", False),
    "windows of 2": lambda model: swap_attention(model, functools.partial(Windowed, window=2)),
    "windows of 4": lambda model: swap_attention(model, functools.partial(Windowed, window=4)),
    "neighbourhoods of 3": lambda model: swap_attention(model, functools.partial(Neighbourhood, size=3)),
    "merge 2 tokens": lambda model: reduce_tokens(model, TokenMerging(2)),
    "merge 4 tokens": lambda model: reduce_tokens(model, TokenMerging(4)),
    "prune half of the tokens": lambda model: reduce_tokens(model, TokenPruning(keep=0.5)),
}
"""Name → a function that changes a model in place and returns an object with `remove()`."""


def images(number, count=3):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(number))


class Random(L.LightningDataModule):
    """Random images with random labels."""

    def __init__(self, number):
        super().__init__()
        self.class_names = ["a", "b", "c"]
        labels = torch.randint(CLASSES, (8,), generator=torch.Generator().manual_seed(number))
        self.samples = [{"image": x, "label": int(y)} for x, y in zip(images(number, 8), labels, strict=True)]

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=4)

    val_dataloader = train_dataloader


def trainer(**options):
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip


class Sequence(RuleBasedStateMachine):
    """One model, and the list of changes that a fresh model needs to reach its structure."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "in").mkdir()
        for number in range(2):
            picture = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(picture).save(self.folder / "in" / f"{number}.png")
        self.exported = None

    def teardown(self):
        shutil.rmtree(self.folder)

    @initialize(build=st.sampled_from([build_vit, build_resnet]))
    def start(self, build):
        torch.manual_seed(0)
        self.build = build
        self.model = build()
        self.changes = []  # (name, the object that undoes the change)

    def fresh(self):
        """Build a model with the same structure and weights, in evaluation mode."""
        model = self.build()
        for name, _ in self.changes:
            CHANGES[name](model)
        model.load_state_dict(self.model.state_dict())
        return model.eval()

    @rule(name=st.sampled_from(sorted(CHANGES)))
    def change(self, name):
        before = list(self.model.state_dict())
        try:
            self.changes.append((name, CHANGES[name](self.model)))
        except UsageError:
            assert list(self.model.state_dict()) == before

    @precondition(lambda self: self.changes)
    @rule(place=st.integers(0, 7))
    def undo(self, place):
        _, change = self.changes.pop(place % len(self.changes))
        change.remove()

    @rule(name=st.sampled_from(METHODS_TO_USE), number=st.integers(0, 2), count=st.sampled_from([1, 3]))
    def explain(self, name, number, count):
        method, batch = METHODS[name](), images(number, count)
        results = []
        for model in (self.model, self.fresh()):
            try:
                found = method(model, batch)
                results.append((found.raw, found.source, found.target))
            except UsageError as error:
                results.append(str(error))
        if isinstance(results[0], str):
            assert results[0] == results[1]
        else:
            torch.testing.assert_close(results[0][0], results[1][0])
            assert results[0][1] == results[1][1]

    @rule(number=st.integers(0, 2))
    def capture(self, number):
        results = []
        for model in (self.model.eval(), self.fresh()):
            try:
                with torch.no_grad(), capture(model, FullAttention()) as records:
                    model(images(number))
                results.append({f"{i} {r.name} {r.grid}": r.weights for i, r in enumerate(records)})
            except UsageError as error:
                results.append(str(error))
        if isinstance(results[0], str):
            assert results[0] == results[1]
        else:
            torch.testing.assert_close(*results)

    @rule(number=st.integers(0, 2))
    def train_two_steps(self, number):
        self.model.train()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        for step in range(2):
            optimizer.zero_grad()
            self.model(images(number + step)).square().mean().backward()
            optimizer.step()

    @rule(number=st.integers(0, 2))
    def fit(self, number):
        trainer(max_steps=2, limit_val_batches=0).fit(Classification(self.model), datamodule=Random(number))

    @rule(number=st.integers(0, 2))
    def validate_with_other_data(self, number):
        tasks = Classification(self.model), Classification(self.fresh())
        scores = [trainer().validate(task, datamodule=Random(number + 3), verbose=False)[0] for task in tasks]
        assert scores[0] == pytest.approx(scores[1])

    @rule()
    def save_and_load(self):
        path = self.folder / "weights.pth"
        torch.save(self.model.state_dict(), path)
        model = self.build()
        changes = [(name, CHANGES[name](model)) for name, _ in self.changes]
        model.load_state_dict(torch.load(path, weights_only=True))
        self.model, self.changes = model, changes

    @rule()
    def copy_deeply(self):
        twin = copy.deepcopy(self.model).eval()
        with torch.no_grad():
            torch.testing.assert_close(twin(images(0)), self.model.eval()(images(0)))
        assert survey_images(twin, images(0)).to_dict() == survey_images(self.model, images(0)).to_dict()

    @rule(name=st.sampled_from(["gradcam", "eigencam"]))
    def export_overlays(self, name):
        def run(model, out):
            explainer = Explainer(model, Preprocess(SIZE), METHODS[name](), ("a", "b", "c"))
            return export([self.folder / "in"], out, explainer, save=["array"], workers=1, console=Console(quiet=True))

        out, again = self.folder / "out", self.folder / "fresh"
        shutil.rmtree(again, ignore_errors=True)
        state = name, [change for change, _ in self.changes], copy.deepcopy(self.model.state_dict())
        summary = run(self.model, out)
        run(self.fresh(), again)
        same = self.exported is not None and self.exported[:2] == state[:2] and equal(self.exported[2], state[2])
        assert summary.written == (0 if same else 2), (summary, state[:2])
        self.exported = state
        for path in again.rglob("*.npz"):
            arrays = [dict(np.load(folder / path.relative_to(again))) for folder in (out, again)]
            assert arrays[0].keys() == arrays[1].keys()
            for key, value in arrays[0].items():
                if value.dtype.kind == "f":
                    np.testing.assert_allclose(value, arrays[1][key], atol=1e-5)
                else:
                    assert np.array_equal(value, arrays[1][key]), key

    @invariant()
    def equals_a_fresh_model(self):
        fresh, model = self.fresh(), self.model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(images(5)), fresh(images(5)))
        assert survey_images(model, images(5)).to_dict() == survey_images(fresh, images(5)).to_dict()


def equal(first, second):
    """Return whether two state dicts hold the same tensors."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def run_sequences(count, number):
    """Run `count` sequences of at most eight steps; `number` seeds their choice."""
    options = settings(
        max_examples=count, stateful_step_count=8, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")  # random weights give constant maps, and Lightning advises more workers
        run_state_machine_as_test(seed(number)(Sequence), settings=options)


def test_every_state_of_a_model_gives_the_results_of_a_model_built_in_that_state():
    run_sequences(12, number=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Run sequences in batches of 20; a batch that is done is not repeated."
    )
    parser.add_argument("count", type=int, help="number of sequences")
    parser.add_argument(
        "--done", default="sequences.txt", help="file with the numbers of finished batches (default: %(default)s)"
    )
    options = parser.parse_args()
    finished = json.loads(Path(options.done).read_text()) if os.path.exists(options.done) else []
    for number in range(1, 1 + options.count // 20):
        if number not in finished:
            run_sequences(20, number)
            finished.append(number)
            Path(options.done).write_text(json.dumps(finished))
            print(f"{20 * len(finished)} sequences", flush=True)
