"""Simulate a full disk with a limit on the size of files."""

import resource
from contextlib import contextmanager


@contextmanager
def disk_full_after(size):
    """Let writes beyond `size` bytes of a file fail. Python ignores SIGXFSZ, so they raise an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
