"""Faults, and when they happen. `tests/faults/server.py` calls these functions in a child before its command line."""

import errno
import hashlib
import json
import os
import signal
import sys
import time


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(owner: object, name: str, number: int, act, *, after: bool = False) -> None:
    """Call `act` before the `number`-th call of `owner.name` (counted from 1), or with `after` after that call."""
    real = getattr(owner, name)
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number and not after:
            act()
        result = real(*args, **kwargs)
        if len(calls) == number and after:
            act()
        return result

    setattr(owner, name, counted)


def record(path: str) -> None:
    """Append a line to a file for every training step: epoch, batch, rank, image paths, hash of the images."""
    from visionattn.tasks import Classification, Detection, GlimpseClassification

    def recorded(real):
        def step(self, batch, batch_idx):
            digest = hashlib.blake2b(batch["image"].numpy().tobytes(), digest_size=8).hexdigest()
            line = [self.trainer.current_epoch, batch_idx, self.trainer.global_rank, batch["path"], digest]
            with open(path, "ab", buffering=0) as file:
                file.write(json.dumps(line).encode() + b"\n")
            return real(self, batch, batch_idx)

        return step

    for task in (Classification, Detection, GlimpseClassification):
        task.training_step = recorded(task.training_step)


def at_step(number: int, act=die, *, after: bool = False) -> None:
    """Call `act` before (or `after`) the `number`-th training step of this process."""
    from visionattn.tasks import Classification, Detection, GlimpseClassification

    for task in (Classification, Detection, GlimpseClassification):
        on_call(task, "training_step", number, act, after=after)


def at_validation_step(number: int, act=die) -> None:
    """Call `act` before the `number`-th validation step of this process."""
    from visionattn.tasks import Classification

    on_call(Classification, "validation_step", number, act)


def at_save(number: int, moment: str, act=die) -> None:
    """Call `act` while the `number`-th checkpoint is written.

    Moments: `begin`; `half`, when half of the content is written; `written`, when the content is on the disk; `moved`,
    when the file has its final name.
    """
    import torch

    from visionattn.training import checkpoint_io

    if moment == "begin":
        on_call(torch, "save", number, act)
    elif moment == "half":

        def half(handle: int) -> None:
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            act()

        saves = []
        real = torch.save

        def save(content, file, *args, **kwargs):
            real(content, file, *args, **kwargs)
            saves.append(1)
            if len(saves) == number:
                file.flush()
                half(file.fileno())

        torch.save = save
        checkpoint_io.torch.save = save
    elif moment == "written":
        on_call(os, "fsync", 2 * number - 1, act, after=True)  # each file has two calls: its content, then its folder
    else:
        on_call(os, "fsync", 2 * number, act)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def hang() -> None:
    time.sleep(600)


def full_at_fsync(number: int) -> None:
    """Let the first `number` calls of os.fsync succeed, then report a full disk."""
    real = os.fsync
    calls = []

    def fsync(handle):
        calls.append(1)
        if len(calls) > number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle)

    os.fsync = fsync


def bad_loss(number: int, value: float = float("nan")) -> None:
    """Multiply the loss of the `number`-th step by `value`."""
    from visionattn.tasks import Classification

    real = Classification.training_step
    calls = []

    def step(self, batch, batch_idx):
        calls.append(1)
        loss = real(self, batch, batch_idx)
        return loss * value if len(calls) == number else loss

    Classification.training_step = step


def bad_weights_at(number: int) -> None:
    """Set all weights to NaN after the `number`-th step."""
    import torch

    from visionattn.tasks import Classification

    calls = []

    def spoil(self, outputs, batch, batch_idx):
        calls.append(1)
        if len(calls) == number:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.fill_(float("nan"))

    Classification.on_train_batch_end = spoil


def run_all(commands: list[list[str]], folder: str) -> None:
    """Run command lines in one process; print [exit code, output, modules imported from `folder`] of each as JSON."""
    import contextlib
    import io

    from visionattn.cli import main

    sys.path.insert(0, folder)
    results = []
    for command in commands:
        output = io.StringIO()
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            code = main(command)
        files = {name: str(getattr(module, "__file__", "")) for name, module in sys.modules.items()}
        imported = [name for name, file in files.items() if file.startswith(folder)]
        results.append([code, output.getvalue(), imported])
    print(json.dumps(results))
    sys.exit(0)


def soak(config: str, images: str, seconds: float, min_turns: int) -> None:
    """Run fit and overlay in turns in one process; print [memory in MB, open files] after each turn as JSON."""
    from visionattn.cli import main

    turns, end = [], time.monotonic() + seconds
    while time.monotonic() < end or len(turns) < min_turns:
        assert main(["fit", "--config", config]) == 0
        out = f"seen/{len(turns)}"
        assert main(["overlay", "--images", images, "--out", out, "--model", "test_vit", "--weights", "random"]) == 0
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        turns.append([pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd"))])
    print(json.dumps(turns))
    sys.exit(0)
