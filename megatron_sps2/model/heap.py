"""Keeps freed memory in the process, for glibc: a forward then reuses the pages of the one before.

Knows the C library's allocator, no tensor.
"""

from __future__ import annotations

import ctypes
import platform

# mallopt's parameters, from malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """From now on, large buffers come from the heap and stay there when freed. False where not possible.

    By default glibc maps large buffers afresh and gives them back at once, so that the kernel clears their
    pages again for every layer. The price: the process keeps its peak of memory until it ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
