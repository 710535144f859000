"""Bytes that operations of the CPU allocate for as long as they run, seen by nobody outside."""

from typing import Any

from trainer.planning.step_costs import CPU_ATTENTION, CPU_ATTENTION_BACKWARD

GLOO_COPIES = "c10d::_reduce_scatter_base_"
KEYS = 512  # that PyTorch's flash kernel for CPUs takes at once
QUERIES = ((768, 256), (192, 64), (0, 32))  # from so many on it takes so many at once


def bytes_inside(func: Any, args: Any, threads: int) -> int:
    """Returns the bytes that an operation holds inside, beside its arguments and its result.

    Flash attention has a tile of scores for each thread, and two in backward. Gloo sums a copy of
    all that is reduced, of which a rank then takes its part.
    """
    if func.name() == GLOO_COPIES:
        return args[1].nbytes
    packet = func.overloadpacket
    if packet is CPU_ATTENTION:
        query, key = args[0], args[1]
        tiles = 1
    elif packet is CPU_ATTENTION_BACKWARD:
        query, key = args[1], args[2]
        tiles = 2
    else:
        return 0
    queries = query.shape[2]
    side = min(queries, next(side for least, side in QUERIES if queries >= least))
    scores = tiles * side * min(KEYS, key.shape[2])
    # Forward keeps a mean, a maximum and a sum for each query, backward a sum.
    sums = side * (2 + query.shape[3]) if tiles == 1 else side
    return threads * (scores + sums) * query.element_size()
