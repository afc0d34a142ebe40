"""The numbered folders of runs: runs/NAME/0, runs/NAME/1, …; one process owns each."""

import os
from pathlib import Path
from typing import Any

from visionattn.errors import UsageError

RUNS = Path("runs")


_HELD: list[Any] = []  # the locked file of the run


_RUN = "VISIONATTN_RUN"  # tells the processes that a DDP run starts which folder is theirs


_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # where torchrun, SLURM and Lightning say which process this is


def _versions(name: str) -> list[Path]:
    """The runs of a name, oldest first."""
    home = RUNS / name
    entries = [entry for entry in home.iterdir() if entry.name.isdigit()] if home.is_dir() else []
    return sorted(entries, key=lambda entry: int(entry.name))


def _new_run(name: str) -> Path:
    """Make runs/<name>/<the next number>; the other processes of the same run use the same."""
    if _RUN in os.environ:
        return Path(os.environ[_RUN])
    home = RUNS / name
    if _rank():  # the first process makes the folder, and Lightning tells this one of it
        return home / "other"
    home.mkdir(parents=True, exist_ok=True)
    versions = _versions(name)
    version = int(versions[-1].name) + 1 if versions else 0
    while True:
        try:
            (home / str(version)).mkdir()
            return home / str(version)
        except FileExistsError:  # another run took the number meanwhile
            version += 1


def _rank() -> int:
    return int(next((os.environ[name] for name in _RANKS if name in os.environ), 0))


def _lock(folder: Path) -> None:
    """Keep others from continuing a run that is running; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # on Windows
        return
    file = open(folder / ".lock", "a")  # noqa: SIM115  # open as long as the process lives
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: worker processes would inherit it
    except BlockingIOError as error:
        raise UsageError(f"{folder} is being trained by another process; wait for it, or start another run") from error
    except OSError:  # a file system without locks
        return
    _HELD.append(file)
