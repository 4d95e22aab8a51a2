"""Whether freed memory stays in the process, for glibc: a forward reuses it, a converter gives it back.

Knows the C library's allocator, no tensor.
"""

from __future__ import annotations

import ctypes
import platform

# mallopt's parameters, from malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
# Buffers from this size on are mapped alone where they are to be given back.
_ALONE_BYTES = 1 << 20


def keep_freed_memory() -> bool:
    """From now on, large buffers come from the heap and stay there when freed. False where not possible.

    By default glibc maps large buffers afresh and gives them back at once, so that the kernel clears their
    pages again for every layer. The price: the process keeps its peak of memory until it ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def return_freed_memory() -> bool:
    """From now on, large buffers go back to the system when freed. False where not possible.

    By default glibc keeps more and more of them, as it learns how large they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _ALONE_BYTES))
