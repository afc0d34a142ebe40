"""The numbered folders of runs: runs/NAME/0, runs/NAME/1, …; one process at a time trains in each."""

import os
from pathlib import Path
from typing import IO

from visionattn.errors import UsageError

RUNS = Path("runs")


_HELD: list[IO[str]] = []  # locked files of the runs of this process
_RUN = "VISIONATTN_RUN"  # environment variable that passes the run's folder to the other processes of DDP
_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # environment variables of torchrun, SLURM and Lightning


def _versions(name: str) -> list[Path]:
    """Return the folders of the runs of a name, oldest first."""
    home = RUNS / name
    entries = [entry for entry in home.iterdir() if entry.name.isdigit()] if home.is_dir() else []
    return sorted(entries, key=lambda entry: int(entry.name))


def _new_run(name: str) -> Path:
    """Create runs/<name>/<next number>; the other processes of the run use the same folder."""
    if _RUN in os.environ:
        return Path(os.environ[_RUN])
    home = RUNS / name
    if _rank():  # the first process creates the folder, and Lightning passes it to this one
        return home / "other"
    home.mkdir(parents=True, exist_ok=True)
    versions = _versions(name)
    version = int(versions[-1].name) + 1 if versions else 0
    while True:
        try:
            (home / str(version)).mkdir()
            return home / str(version)
        except FileExistsError:  # another run has just taken the number
            version += 1


def _rank() -> int:
    return int(next((os.environ[name] for name in _RANKS if name in os.environ), 0))


def _lock(folder: Path) -> None:
    """Lock a run so that no other process continues it. The system releases the lock when the process ends.

    Raises:
        UsageError: another process is training the run.
    """
    try:
        import fcntl
    except ImportError:  # on Windows
        return
    file = open(folder / ".lock", "a")  # noqa: SIM115  # stays open until the process ends
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which worker processes would inherit
    except BlockingIOError as error:
        raise UsageError(f"{folder} is being trained by another process; wait for it, or start another run") from error
    except OSError:  # a file system without locks
        return
    _HELD.append(file)
