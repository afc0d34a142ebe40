"""A callback that measures the steps of a training, for `tests/benchmarks/training.py`."""

import json

from lightning.pytorch.callbacks import Callback

from tests.benchmarks.training import Clock


class StepClock(Callback):
    """Record the time after each optimizer step, and print the times at the end of the training."""

    def __init__(self):
        self.clock = Clock()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.clock.tick()

    def on_train_end(self, trainer, pl_module):
        print(json.dumps(self.clock.steps))
