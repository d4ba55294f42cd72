"""Count the processor cores that this process may use."""

import os


def available_cores() -> int:
    """Return the number of cores that this process may run on, where the system tells it."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
