"""The blocks of rings of 4 and 8 ranks, computed in turn on one card, beside one undivided call."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from scripts.benchmarks.ring_blocks import RingHeads, measure
from scripts.gpu_checks.card import HEAD_WIDTH, HEADS, KEY_HEADS, card

RANKS = (4, 8)
TOKENS = 131_072
REPEATS = 3
MOST = 1 / 0.95  # of the time of one call


class RingCheck(NamedTuple):
    """The arguments of the measurement."""

    device: torch.device
    tokens: int
    sizes: RingHeads


def prepare(dry: bool) -> RingCheck:
    """Returns the sizes, and has the card's context made."""
    device = card(dry)
    torch.zeros(1, device=device)
    if dry:
        return RingCheck(device, 64, RingHeads(4, 2, 16))
    return RingCheck(device, TOKENS, RingHeads(HEADS, KEY_HEADS, HEAD_WIDTH))


def check(prepared: RingCheck, seconds: float) -> Iterator[dict[str, Any]]:
    """Yields a row for one call and for each number of ranks."""
    device, tokens, sizes = prepared
    for row in measure(device, torch.bfloat16, tokens, RANKS, REPEATS, sizes):
        yield {
            "tokens": tokens,
            "ranks": row["ranks"],
            "ms": round(1e3 * row["seconds"], 2),
            "against one call": round(row["against_one"], 3),
            "apart": row["apart"],
            "as fast as asked": row["against_one"] <= MOST,
            "passed": row["exact"],
        }
