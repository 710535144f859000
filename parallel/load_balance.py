"""Balances attention work: counts visible keys per token and assigns chunks to ranks.

Packed documents make any fixed cut uneven, because a token's work is its place in its own document.
So the row is cut into small chunks, and the heaviest chunk that is left always goes to the rank
that has least to do (and room for it).

Source: Tao et al. 2025, MagiAttention (dispatch by a min-heap with equal counts). Ours is a pure
function of the row's addresses that every rank works out for itself, and pads instead of asking for
lengths that divide.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.kernels.block_plan import CAUSAL_TILE, FULL_TILE, plan_tiles
from models.masks.algebra import Mask, visible
from models.span import Span

CHUNK = (
    512  # tokens of the largest chunk: smaller ones balance better and cut the row into more runs
)


def chunk_tokens(tokens: int, ranks: int, step: int = 1) -> int:
    """Tokens in a chunk: at least eight chunks a rank where the row is long enough, and a multiple
    of `step`."""
    side = max(1, min(CHUNK, -(-tokens // (8 * ranks))))
    return -(-side // step) * step


def assign_chunks(work: Sequence[int], ranks: int) -> list[list[int]]:
    """For each rank the numbers of its chunks, rising; every rank gets equally many.

    Args:
        work: of each chunk; their count must divide among the ranks.
    """
    assert len(work) % ranks == 0, "the row is filled up with empty chunks before it is dealt"
    room = len(work) // ranks
    held = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]
    for chunk in sorted(range(len(work)), key=lambda c: (-work[c], c)):
        busy, rank = heapq.heappop(heap)
        held[rank].append(chunk)
        if len(held[rank]) < room:
            heapq.heappush(heap, (busy + work[chunk], rank))
    return [sorted(chunks) for chunks in held]


def visible_keys(span: Span, mask: Mask | None = None) -> Tensor:
    """[B, T] int64 on the CPU: how many keys of its own row each token sees; without a mask,
    causally in its document."""
    if mask is None:
        return torch.where(span.valid(), span.pos + 1, 0).cpu()
    seen = torch.zeros(span.shape, dtype=torch.int64)
    for block in plan_tiles(mask, span, span):
        rows = slice(block.r0, block.r1)
        q = slice(block.q0, block.q1)
        k = slice(block.k0, block.k1)
        if block.kind == FULL_TILE:
            seen[rows, q] += block.k1 - block.k0
        elif block.kind == CAUSAL_TILE:
            seen[rows, q] += torch.arange(1, block.q1 - block.q0 + 1)
        else:
            look = visible(
                mask,
                span.map(lambda t, r=rows, x=q: t[r, x]),
                span.map(lambda t, r=rows, x=k: t[r, x]),
            )
            seen[rows, q] += look.sum(-1).amax(1).cpu()
    return seen


def chunk_work(keys: Tensor, side: int, chunks: int) -> list[int]:
    """Work of each chunk of a row [T] of visible keys; chunks beyond the row have none."""
    filled = np.zeros(side * chunks, dtype=np.int64)
    filled[: len(keys)] = keys.numpy()
    return filled.reshape(chunks, side).sum(1).tolist()


def imbalance(work: Sequence[int]) -> float:
    """Work of the busiest rank in units of the mean; 1 is perfect."""
    return max(work) * len(work) / sum(work) if sum(work) else 1.0
