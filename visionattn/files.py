"""Names of files: printable, in natural order, no addresses. Atomic writes: a whole file is replaced, or nothing.

`FolderLock` lets one process at a time write into a folder.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import stat
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeAlias

from visionattn.errors import DataError, UsageError

AnyPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

PART_PREFIX = ".part."
"""Prefix of the name of a temporary file."""

LOCK = ".manifest.lock"
"""Name of the file that holds the lock of a folder of overlays."""

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # a lock that is a link would change the file that it points to
_TRIES = 100  # to make a folder that other processes remove meanwhile
_LONGEST_NAME = 255  # bytes, on every common file system


def printable(name: AnyPath) -> str:
    """Return a file name that a terminal can show: control characters, and bytes that are not valid text, become �."""
    spaced = (" " if unicodedata.category(letter) == "Zs" else letter for letter in os.fsdecode(name))
    return "".join(letter if letter.isprintable() else "�" for letter in spaced)


def is_address(name: str) -> bool:
    """Return whether a name starts with `scheme://`, as `s3://bucket/a.jpg` and `simplecache::s3://bucket/a.jpg`."""
    return re.match(r"[A-Za-z][\w+.:-]+://", name) is not None  # not C://


def local_path(path: AnyPath, option: str = "") -> str:
    """Return a path as text, and refuse an address such as `s3://bucket/out`, which would become a local folder `s3:`.

    Args:
        path: path of a file or folder to read or write; names may contain bytes that are not valid text.
        option: name of the option that holds the path, for the message.

    Raises:
        UsageError: the path starts with `scheme://`.
    """
    name = os.fsdecode(path)
    if is_address(name):
        raise UsageError(
            f"{option and f'{option}: '}{printable(name)} is an address, and only files on this machine are read and "
            "written; copy the files, and give a local path"
        )
    return name


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Return a sort key that puts img2 before img10. Different names have different keys, also img1 and img01."""
    parts: list[int | str] = []  # text and numbers alternate, so text is never compared with a number
    for place, part in enumerate(re.split("([0-9]+)", name)):
        parts.append(int(part) if place % 2 else part)
    return parts, name


def write_file(path: AnyPath, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: at any moment its name refers to the earlier file or to the complete new file.

    See `Replacement`.

    Args:
        path: path of the file; its folder must exist.
        content: the bytes, or a function that writes them into the open file.

    Raises:
        UsageError: the path is an address, see `local_path`.
        DataError: the file cannot be written. The earlier file is unchanged and the temporary file is removed.
    """
    new = Replacement(path)
    try:
        new.write(content)
        new.commit()
    except BaseException:  # remove the temporary file after Ctrl-C too
        new.discard()
        raise


class Replacement:
    """A file that is written under a temporary name, then renamed to its final name.

    The temporary name is `.part.NAME` in the same folder. `commit` waits until the content is on disk, renames the
    file, and waits until the new name is on disk too. So after a kill, a full disk or a power cut the path holds either
    the earlier file or the new file. If a killed process left a temporary file, the next process that writes the same
    file replaces it.

    Attributes:
        path: the final, absolute path.
        part: the temporary path.

    Args:
        path: the final path; its folder must exist.

    Raises:
        UsageError: the path is an address, see `local_path`.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = os.path.abspath(local_path(path))
        folder, name = os.path.split(self.path)
        if len(os.fsencode(PART_PREFIX + name)) > _LONGEST_NAME:
            digits = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
            name = f"{digits}{os.path.splitext(name)[1]}"
        self.part = os.path.join(folder, PART_PREFIX + name)
        self._inode: int | None = None

    def write(self, content: bytes | Callable[[BinaryIO], object]) -> None:
        """Write the content into the temporary file.

        Args:
            content: the bytes, or a function that writes them into the open file.

        Raises:
            DataError: the file cannot be written.
        """
        with _named(self.path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.part)  # if the name is a link, writing would change the file that it points to
            with open(self.part, "xb") as file:
                self._inode = os.fstat(file.fileno()).st_ino
                if callable(content):
                    content(file)
                else:
                    file.write(content)

    def commit(self) -> None:
        """Wait until the content is on disk, then rename the file. The new file gets the earlier file's permissions.

        Raises:
            DataError: the file cannot be renamed, or another process has begun to write the same file.
        """
        with _named(self.path):
            with open(self.part, "rb+") as file:
                if self._inode not in (None, os.fstat(file.fileno()).st_ino):
                    raise OSError("another process is writing the same file")
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):
                os.chmod(self.part, stat.S_IMODE(os.stat(self.path).st_mode))
            os.replace(self.part, self.path)
        _sync_folder(os.path.dirname(self.path))

    def discard(self) -> None:
        """Remove the temporary file."""
        with contextlib.suppress(OSError):
            os.unlink(self.part)


class FolderLock:
    """Holds the lock of a folder inside a `with` block.

    The operating system locks the file `.manifest.lock`, which contains the name of the process that holds the lock.
    The system releases the lock when the process ends, also after a kill. On exit the file is removed, and so are
    folders that were made for the file and are still empty. No lock is taken in a folder in which this process can
    write no file, on a file system without locks, or on Windows. There, `Manifest` notices if another process writes
    into the same manifest.

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
                handle = os.open(self._path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
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
        for tries_left in reversed(range(_TRIES)):
            try:
                os.makedirs(self._folder, exist_ok=True)
                break
            except OSError as error:
                # an export that ends may remove the folder above before this one is made
                if tries_left == 0 or not isinstance(error, (FileNotFoundError, FileExistsError)):
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
                f"{printable(self._folder)} is being written by {_holder_named(os.pread(handle, 4096, 0))}; wait until "
                "it ends, or choose another folder for overlays"
            ) from error
        except OSError:
            return False
        return True

    def _is_current(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self._path))
        except OSError:
            return False


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Turn an operating system's error into a DataError that names the file."""
    try:
        yield
    except Exception as error:
        reason = _os_error(error)
        if reason is None:
            raise
        raise DataError(f"{printable(path)} cannot be written: {reason.strerror or reason}") from error


def _os_error(error: Exception) -> OSError | None:
    """Return the OSError that caused an error, or None. (torch.save reports a full disk as a RuntimeError.)"""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause


def _sync_folder(folder: str) -> None:
    """Wait until the names in a folder are on disk. Do nothing on systems that cannot open a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _holder() -> dict[str, str | int]:
    return {"process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _holder_named(content: bytes) -> str:
    """Return the name of a lock's holder, given the content of the file."""
    try:
        holder = json.loads(content)
        return f"process {holder['process']} on {printable(holder['machine'])} since {printable(holder['since'])}"
    except (ValueError, TypeError, LookupError):  # the holder has not yet written its name
        return "another process"
