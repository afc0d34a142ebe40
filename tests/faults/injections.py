"""Faults and their moments. Each function is called in a forked child before the command line runs."""

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
    """Run `act` at the `number`-th call of `owner.name`, counted from 1, before it or after it."""
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
    """Note the images of every training step, with a hash of what the network is given."""
    from visionattn.tasks import Classification, Detection, GlimpseClassification

    def recorded(real):
        def step(self, batch, batch_idx):
            seen = hashlib.blake2b(batch["image"].numpy().tobytes(), digest_size=8).hexdigest()
            line = [self.trainer.current_epoch, batch_idx, self.trainer.global_rank, batch["path"], seen]
            with open(path, "ab", buffering=0) as file:
                file.write(json.dumps(line).encode() + b"\n")
            return real(self, batch, batch_idx)

        return step

    for task in (Classification, Detection, GlimpseClassification):
        task.training_step = recorded(task.training_step)


def at_step(number: int, act=die, *, after: bool = False) -> None:
    """In the `number`-th training step of this process."""
    from visionattn.tasks import Classification, Detection, GlimpseClassification

    for task in (Classification, Detection, GlimpseClassification):
        on_call(task, "training_step", number, act, after=after)


def at_validation_step(number: int, act=die) -> None:
    from visionattn.tasks import Classification

    on_call(Classification, "validation_step", number, act)


def at_save(number: int, moment: str, act=die) -> None:
    """In the `number`-th checkpoint that is written: `begin`, `half` written, `written`, `moved`."""
    import torch

    from visionattn.training import checkpoint_io as durable

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
        durable.torch.save = save
    elif moment == "written":
        on_call(os, "fsync", 2 * number - 1, act, after=True)  # then its folder's
    else:
        on_call(os, "fsync", 2 * number, act)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def hang() -> None:
    time.sleep(600)


def full_at_fsync(number: int) -> None:
    """The disk is full when the `number`-th file that must be whole goes to it, and from then on."""
    real = os.fsync
    calls = []

    def fsync(handle):
        calls.append(1)
        if len(calls) > number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle)

    os.fsync = fsync


def bad_loss(number: int, value: float = float("nan")) -> None:
    """The loss of the `number`-th step is no number."""
    from visionattn.tasks import Classification

    real = Classification.training_step
    calls = []

    def step(self, batch, batch_idx):
        calls.append(1)
        loss = real(self, batch, batch_idx)
        return loss * value if len(calls) == number else loss

    Classification.training_step = step


def bad_weights_at(number: int) -> None:
    """The `number`-th step leaves weights that are no numbers."""
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
    """Run command lines in one process; tell of each its code, its message, and what it imported from `folder`."""
    import contextlib
    import io

    from visionattn.cli import main

    sys.path.insert(0, folder)
    results = []
    for command in commands:
        os.environ.pop("VISIONATTN_RUN", None)
        told = io.StringIO()
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            code = main(command)
        homes = {name: str(getattr(module, "__file__", "")) for name, module in sys.modules.items()}
        strange = [name for name, home in homes.items() if home.startswith(folder)]
        results.append([code, told.getvalue(), strange])
    print(json.dumps(results))
    sys.exit(0)


def soak(config: str, images: str, seconds: float, least: int) -> None:
    """Fit and export in a loop, in one process; tell its memory in MB and its open files after each turn."""
    from visionattn.cli import main

    turns, end = [], time.monotonic() + seconds
    while time.monotonic() < end or len(turns) < least:
        os.environ.pop("VISIONATTN_RUN", None)
        assert main(["fit", "--config", config]) == 0
        out = f"seen/{len(turns)}"
        assert main(["overlay", "--images", images, "--out", out, "--model", "test_vit", "--weights", "random"]) == 0
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        turns.append([pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd"))])
    print(json.dumps(turns))
    sys.exit(0)
