"""CPU time of one job over another, in turns."""

import statistics
import time


def ratio(job, other, rounds, repeats=1):
    """Median of the CPU time of one job over that of the other right before and after it."""
    spent(job, 1), spent(other, 1)  # once unmeasured: memory is mapped
    found, before = [], spent(other, repeats)
    for _ in range(rounds):
        own, after = spent(job, repeats), spent(other, repeats)
        found.append(2 * own / (before + after))
        before = after
    return statistics.median(found)


def spent(job, repeats):  # of the second thread the system counts ticks of some milliseconds: not too little at once
    start = time.process_time()
    for _ in range(repeats):
        job()
    return time.process_time() - start
