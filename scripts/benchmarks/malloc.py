"""Memory that a tensor on the CPU gave back stays with the process, for the next tensor."""

import ctypes

LIBC = ctypes.CDLL(None)
# numbers of glibc's malloc.h
TRIM_THRESHOLD = -1
MMAP_MAX = -4


def keep_heap() -> bool:
    """Have the C library serve large tensors from its heap and never shrink it; False where it is
    not glibc.

    glibc asks the system for every block above 32 MiB anew and gives it back when freed, so each
    large temporary of each
    step is paid for page by page, in zeros: at 65,536 tokens that was up to two thirds of the time
    of a linear-time layer on a CPU. The price: small blocks come to lie in the holes of large ones,
    which then no longer fit. The most that a process held rose by 49 % for Performer and 44 % for
    retention, and fell by 14 % for RWKV-7; so it is for who measures or has the room, not for every
    run. Does nothing to the memory of a GPU.
    """
    if not hasattr(LIBC, "mallopt"):
        return False
    return bool(LIBC.mallopt(MMAP_MAX, 0) and LIBC.mallopt(TRIM_THRESHOLD, -1))
