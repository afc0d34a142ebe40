"""The numbered folders of runs, runs/NAME/0, runs/NAME/1, …, and locks so that a run is trained only once at a time."""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from visionattn.errors import UsageError
from visionattn.files import PART_PREFIX

RUNS = Path("runs")

_HELD: list[IO[str]] = []  # open lock files of the runs that this process trains
_RUN = "VISIONATTN_RUN"  # environment variable that gives the run's folder to the other processes of DDP
_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # process numbers in the environment: torchrun, SLURM, Lightning
_LOCK = ".lock"
_LONGEST_NAME = 255  # bytes, on every common file system


@contextlib.contextmanager
def _released() -> Iterator[None]:
    """After the `with` block, unlock the runs and forget their folder, so that a later run gets a folder of its own."""
    before = os.environ.get(_RUN)
    try:
        yield
    finally:
        while _HELD:
            _HELD.pop().close()
        os.environ.pop(_RUN, None)
        if before is not None:  # this process belongs to a run that another process has started
            os.environ[_RUN] = before


def _check_name(name: str) -> None:
    """Check that the folder of a run's name is directly in runs/.

    Raises:
        UsageError: the name is not that of a single folder.
    """
    if name in (".", "..") or re.search(r"[/\\\0]", name) or len(os.fsencode(name)) > _LONGEST_NAME:
        raise UsageError(f"--name must be the name of one folder in {RUNS}/, without slashes, got {name!r}")


def _versions(name: str) -> list[Path]:
    """Return the folders of the runs with this name, oldest first."""
    home = RUNS / name
    entries = [entry for entry in home.iterdir() if entry.name.isdigit()] if home.is_dir() else []
    return sorted(entries, key=lambda entry: int(entry.name))


def _new_run(name: str) -> Path:
    """Create runs/<name>/<next number>, or return the folder that the first process of the run has created."""
    if _RUN in os.environ:
        return Path(os.environ[_RUN])
    home = RUNS / name
    if _rank():  # only the first process creates the folder, and Lightning replaces this path by that folder
        return home / "other"
    home.mkdir(parents=True, exist_ok=True)
    versions = _versions(name)
    version = int(versions[-1].name) + 1 if versions else 0
    while True:
        try:
            (home / str(version)).mkdir()
            return home / str(version)
        except FileExistsError:  # another run has just created this folder
            version += 1


def _rank() -> int:
    return int(next((os.environ[name] for name in _RANKS if name in os.environ), 0))


def _lock(folder: Path) -> None:
    """Lock a run, so that no other process can train it. The system releases the lock when the process ends.

    Raises:
        UsageError: another process is training the run.
    """
    try:
        file = _locked(folder)
    except BlockingIOError as error:
        raise UsageError(f"{folder} is being trained by another process; wait for it, or start another run") from error
    if file is not None:
        _HELD.append(file)


def _remove_empty(folder: Path) -> None:
    """Remove the folder of a run that ended before it wrote a file; a folder with files is kept."""
    with contextlib.suppress(OSError):
        if {entry.name for entry in folder.iterdir()} <= {_LOCK}:
            (folder / _LOCK).unlink(missing_ok=True)
            folder.rmdir()


def _remove_unfinished_files(name: str) -> None:
    """Remove the temporary files that killed trainings have left in the runs with this name.

    Otherwise these files would stay. A temporary file disappears only when the same file is written again, and a run
    that was killed before its first checkpoint is never continued.
    """
    for folder in _versions(name):
        with contextlib.suppress(OSError):  # for example because the run is being trained
            unfinished = list(folder.glob(f"{PART_PREFIX}*"))
            if not unfinished or not (folder / _LOCK).exists():  # only `fit` locks its folder
                continue
            if (file := _locked(folder)) is not None:
                with file:
                    for path in unfinished:
                        path.unlink(missing_ok=True)


def _locked(folder: Path) -> IO[str] | None:
    """Lock a run and return the open file that holds the lock, or None if there are no locks on this system.

    Raises:
        BlockingIOError: another process has locked the run.
    """
    file = open(folder / _LOCK, "a")  # noqa: SIM115  # the caller closes it
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # worker processes would inherit a lock of fcntl.flock
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise
        return None  # the file system does not support locks
    return file
