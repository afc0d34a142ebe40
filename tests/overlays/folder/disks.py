"""A disk that is full after a number of bytes."""

import resource
from contextlib import contextmanager


@contextmanager
def disk_full_after(size):
    """No file may become larger than this limit; Python ignores SIGXFSZ, so the write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
