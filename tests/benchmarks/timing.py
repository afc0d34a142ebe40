"""The ratio of the CPU times of two jobs that run in turns."""

import statistics
import time


def ratio(job, other, rounds, repeats=1):
    """Return the median of (CPU time of `job`) ÷ (mean CPU time of `other` before and after it)."""
    spent(job, 1), spent(other, 1)  # the first run is not measured, since it allocates memory
    ratios, before = [], spent(other, repeats)
    for _ in range(rounds):
        own, after = spent(job, repeats), spent(other, repeats)
        ratios.append(2 * own / (before + after))
        before = after
    return statistics.median(ratios)


def spent(job, repeats):
    """Return the mean CPU time of a job. The system counts threads in ticks of milliseconds, so repeat short jobs."""
    start = time.process_time()
    for _ in range(repeats):
        job()
    return time.process_time() - start
