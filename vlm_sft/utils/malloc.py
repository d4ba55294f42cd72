"""Settings of the C library's memory allocator that make training on a CPU faster."""

import os
from collections.abc import Mapping
from typing import Final

FAST_MALLOC: Final = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
)
"""Value of GLIBC_TUNABLES: freed memory stays with the process.

By default glibc returns large buffers to the system and requests them again at every step. An
EfficientNet encoder ran 2.5 times as fast with these values on 2 CPU cores. glibc reads it only
when a process starts, so it is set for child processes.
"""


def fast_malloc_environment() -> Mapping[str, str]:
    """Return the environment with `FAST_MALLOC`, unless GLIBC_TUNABLES is set already."""
    return {"GLIBC_TUNABLES": FAST_MALLOC, **os.environ}
