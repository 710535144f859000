"""Sizes of the blocks of each kernel, by dtype, width and score."""

from typing import NamedTuple

import torch

FORWARD, QUERY_GRADIENT, KEY_GRADIENT = "forward", "query gradient", "key gradient"
NARROWEST = 16  # a side of the products of Triton
WIDEST = 256


class BlockConfig(NamedTuple):
    """Queries and keys of a block, and how a program is compiled."""

    side_q: int
    side_k: int
    warps: int
    stages: int


def filled_up(width: int) -> int:
    """The power of two that a width is filled up to."""
    return max(NARROWEST, 1 << (width - 1).bit_length())


# By the widest head, for masks and slopes, and for what keeps more numbers alive: numbers by
# distance and soft caps. Chosen so that no generation spills (compiled.py tells), not by time: no
# card was at hand.
SIZES: dict[tuple[str, int, bool], BlockConfig] = {
    (FORWARD, 64, False): BlockConfig(64, 64, 4, 2),
    (FORWARD, 64, True): BlockConfig(64, 32, 8, 2),
    (FORWARD, 128, False): BlockConfig(64, 64, 4, 2),
    (FORWARD, 128, True): BlockConfig(64, 32, 8, 2),
    (FORWARD, 256, False): BlockConfig(32, 32, 4, 2),
    (FORWARD, 256, True): BlockConfig(32, 32, 4, 2),
    (QUERY_GRADIENT, 64, False): BlockConfig(64, 64, 8, 2),
    (QUERY_GRADIENT, 64, True): BlockConfig(32, 32, 4, 2),
    (QUERY_GRADIENT, 128, False): BlockConfig(64, 64, 8, 2),
    (QUERY_GRADIENT, 128, True): BlockConfig(32, 32, 4, 2),
    (QUERY_GRADIENT, 256, False): BlockConfig(32, 32, 4, 1),
    (QUERY_GRADIENT, 256, True): BlockConfig(32, 32, 4, 1),
    (KEY_GRADIENT, 64, False): BlockConfig(64, 64, 8, 2),
    (KEY_GRADIENT, 64, True): BlockConfig(32, 32, 4, 2),
    (KEY_GRADIENT, 128, False): BlockConfig(32, 32, 4, 2),
    (KEY_GRADIENT, 128, True): BlockConfig(32, 32, 4, 2),
    (KEY_GRADIENT, 256, False): BlockConfig(32, 32, 8, 1),
    (KEY_GRADIENT, 256, True): BlockConfig(32, 32, 8, 1),
}
FLOAT32 = BlockConfig(32, 32, 4, 1)


def widest(dtype: torch.dtype) -> int:
    """Returns the widest head that the kernels take: float32 needs twice the registers and more."""
    return 64 if dtype == torch.float32 else WIDEST


def size_of(kernel: str, dtype: torch.dtype, width: int, *, heavy: bool) -> BlockConfig:
    """Returns the blocks of a kernel.

    Args:
        width: the wider one of keys and values, filled up.
        heavy: whether numbers by distance are added, or the logits are capped.
    """
    if dtype == torch.float32:
        return FLOAT32
    return SIZES[kernel, max(width, 64), heavy]
