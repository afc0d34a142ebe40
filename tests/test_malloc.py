"""Freed memory is reused without page faults."""

import subprocess
import sys

FAULTS = """
import ctypes, resource, sys
from visionattn._malloc import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def rounds(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        block = libc.malloc(48 << 20)
        libc.memset(block, 1, 48 << 20)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
rounds(1)
print(rounds(10))
"""


def test_a_block_of_the_same_size_costs_no_page_faults():
    default, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, way], check=True, capture_output=True).stdout)
        for way in ("default", "keep")
    )
    assert default >= 10 * 24  # huge pages of 2 MB at best
    assert kept < default / 10
