"""Count the CPU cores that are available to this process."""

import os


def available_cores() -> int:
    """Return the number of CPU cores in this process's affinity mask.

    On platforms without affinity masks (macOS, Windows), it is that of the machine.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
