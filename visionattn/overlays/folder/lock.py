"""A lock on a folder of overlays, so that one export at a time writes into it."""

import contextlib
import json
import os
import socket
import time

from visionattn.errors import DataError, UsageError
from visionattn.files import printable

LOCK = ".manifest.lock"


class FolderLock:
    """Holds the lock of a folder inside a `with` block.

    The lock is a lock of the operating system on the file `.manifest.lock`, which names its holder. The system releases
    the lock when the process ends, also after a kill. On exit the file is removed, and so are folders that were
    made for it and are still empty. A folder in which this process can write no file is not locked, and neither is
    a folder on a file system without locks, or on Windows: there `Manifest` finds out that another process has
    written.

    Args:
        folder: absolute path of the folder; it is made if it does not exist.

    Raises:
        UsageError: another process holds the lock, or `folder` is a file.
        DataError: the folder cannot be made.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._path = os.path.join(folder, LOCK)
        self._handle: int | None = None
        self._made: list[str] = []  # folders that did not exist, deepest first

    def __enter__(self) -> "FolderLock":
        if os.path.lexists(self._folder) and not os.path.isdir(self._folder):
            raise UsageError(f"{printable(self._folder)} is a file; name a folder for the overlays")
        while self._handle is None:
            self._make_folder()
            try:
                handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # another export, which has just ended, has removed the folder
            except OSError:
                return self  # nothing can be written into this folder
            try:
                if not self._lock(handle):
                    os.close(handle)
                    return self
            except BaseException:
                os.close(handle)
                raise
            if self._is_current(handle):
                self._handle = handle
            else:
                os.close(handle)  # another export, which has just ended, has removed the file
        with contextlib.suppress(OSError):  # on a full disk the lock holds without the name of its holder
            os.ftruncate(self._handle, 0)
            os.write(self._handle, json.dumps(_holder()).encode())
        return self

    def __exit__(self, *error: object) -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)  # before the lock is released, so that no other process has locked the file
            os.close(self._handle)
            self._handle = None
        with contextlib.suppress(OSError):
            for folder in self._made:
                os.rmdir(folder)

    def _make_folder(self) -> None:
        missing, folder = [], self._folder
        while not os.path.isdir(folder) and os.path.dirname(folder) != folder:
            missing.append(folder)
            folder = os.path.dirname(folder)
        try:
            os.makedirs(self._folder, exist_ok=True)
        except OSError as error:
            raise DataError(f"{printable(self._folder)} cannot be made: {error.strerror or error}") from error
        self._made = missing or self._made

    def _lock(self, handle: int) -> bool:
        """Lock the file; return False if the system cannot lock it.

        Raises:
            UsageError: another process holds the lock.
        """
        try:
            import fcntl
        except ImportError:  # on Windows
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{printable(self._folder)} is being written by {_named(os.pread(handle, 4096, 0))}; wait until it "
                "ends, or choose another folder for overlays"
            ) from error
        except OSError:
            return False
        return True

    def _is_current(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self._path))
        except OSError:
            return False


def _holder() -> dict[str, str | int]:
    return {"process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _named(content: bytes) -> str:
    """Return the name of a lock's holder, given the content of the file."""
    try:
        holder = json.loads(content)
        return f"process {holder['process']} on {printable(holder['machine'])} since {printable(holder['since'])}"
    except (ValueError, TypeError, LookupError):  # the holder has not yet written its name
        return "another process"
