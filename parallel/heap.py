"""The heap of the C library, which serves tensors on the CPU."""

import ctypes

import torch

LIBC = ctypes.CDLL(None)
CPU = torch.device("cpu")


def trim_heap(device: torch.device = CPU) -> bool:
    """Gives the pages of freed memory back to the system; says whether it did.

    It does not where the C library is not glibc, nor for tensors of another device.

    glibc keeps what was freed between blocks that are still held. Where small tensors that stay lie
    among large ones that go, the holes are too small for the next large ones, and the heap grows
    while next to nothing is held. A trim takes about 10 ms for some hundred MiB of holes.
    """
    if device.type != "cpu" or not hasattr(LIBC, "malloc_trim"):
        return False
    LIBC.malloc_trim(0)
    return True
