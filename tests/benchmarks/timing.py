"""The ratio of the times of two jobs that run in turns, on the CPU or on a GPU."""

import statistics
import time

import torch


def add_device(parser):
    """Add the option --device to a benchmark's parser."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where tensors and networks are (default: cpu)"
    )


def use_device(device):
    """Create new tensors and networks on this device."""
    torch.set_default_device(device)


def clock(device=None):
    """Return the time in seconds: the CPU time of this process or, on a GPU, wall time after all its work is done."""
    if torch.device(device or torch.get_default_device()).type == "cpu":
        return time.process_time()
    return wall_clock()


def wall_clock():
    """Return the wall time in seconds, after the work of a GPU is done if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def ratio(job, other, rounds, repeats=1):
    """Return the median of (time of `job`) ÷ (mean time of `other` before and after it)."""
    spent(job, 1), spent(other, 1)  # the first run is not measured, since it allocates memory
    ratios, before = [], spent(other, repeats)
    for _ in range(rounds):
        own, after = spent(job, repeats), spent(other, repeats)
        ratios.append(2 * own / (before + after))
        before = after
    return statistics.median(ratios)


def spent(job, repeats):
    """Return the mean time of a job. The system counts threads in ticks of milliseconds, so repeat short jobs."""
    start = clock()
    for _ in range(repeats):
        job()
    return (clock() - start) / repeats
