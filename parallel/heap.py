"""Memory that a tensor on the CPU gave back stays with the process, for the next tensor."""

import ctypes

LIBC = ctypes.CDLL(None)
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # numbers of glibc's malloc.h


def keep_heap() -> bool:
    """Have the C library serve large tensors from its heap and never shrink it; False where it is not glibc.

    glibc asks the system for every block above 32 MiB anew and gives it back when freed, so each large temporary of each
    step is paid for page by page, in zeros: at 65,536 tokens that was up to two thirds of the time of a linear-time layer
    on a CPU. What a process holds at most rises by what lies between blocks. Does nothing to the memory of a GPU.
    """
    if not hasattr(LIBC, "mallopt"):
        return False
    return bool(LIBC.mallopt(MMAP_MAX, 0) and LIBC.mallopt(TRIM_THRESHOLD, -1))
