"""Tiles of sorted queries, each beside the stretch of sorted keys that its queries see.

Where tokens can be sorted so that the keys of a query lie side by side (equal hashes, a window),
a tile of queries attends to one short stretch of keys. Tiles of similar stretches are computed
together.

Letters: L lines, T queries and S keys of a line, n tiles of a line, N tiles computed together,
t queries of a tile, s keys of its stretch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.kernels.pairs import readings

TILE = 64  # queries of a tile, where there are as many queries as keys
LEAST_TILE = 8


class SortedLines(NamedTuple):
    """Queries and keys in an order in which the keys of a query lie side by side.

    Attributes:
        order: [L, T] numbers of the queries.
        low, high: [L, T] the sorted keys [low, high) that each of them sees.
        key_order: [L, S] numbers of the keys.
    """

    order: Tensor
    low: Tensor
    high: Tensor
    key_order: Tensor


class KeyStretches(NamedTuple):
    """N tiles of t queries, each with a stretch of s keys.

    Attributes:
        line: [N] number of the line.
        token: [N, t] numbers of queries in their line.
        source: [N, s] numbers of keys in their line.
        seen: [N, t, s] 1 where a query sees a key, else 0; of the dtype asked for.
        real: [N, t] bool, False at queries that only fill a tile; None where all are real.
    """

    line: Tensor
    token: Tensor
    source: Tensor
    seen: Tensor
    real: Tensor | None


def tile_stretches(
    lines: SortedLines, most: int, dtype: torch.dtype, heads: int = 1
) -> Iterator[KeyStretches]:
    """Yields every query once that sees a key.

    Args:
        lines: what to cut.
        most: scores to yield at a time.
        dtype: floating point, of `seen`.
        heads: scores of each pair.
    """
    count, tokens = lines.order.shape
    sources = lines.key_order.shape[1]
    # a tile of few queries among many keys would span keys that none of them sees
    side = max(LEAST_TILE, TILE * tokens // max(tokens, sources))
    more = -tokens % side
    token = _tiled(lines.order, more, side, 0)
    low = _tiled(lines.low, more, side, sources)
    high = _tiled(lines.high, more, side, 0)
    real = None
    if more:
        real = _tiled(torch.ones_like(lines.order, dtype=torch.bool), more, side, False)
        real = real.flatten(0, 1)
    sees = low < high
    start = torch.where(sees, low, sources).min(-1).values
    width = torch.where(sees, high, 0).max(-1).values - start
    line = torch.arange(count, device=start.device)[:, None].expand(start.shape).flatten()
    start = start.flatten()
    token, low, high = (numbers.flatten(0, 1) for numbers in (token, low, high))
    key_order = lines.key_order.flatten()
    widths, ranking = width.flatten().sort(descending=True)
    groups = _groups(readings.widths_of(widths), most // (side * heads))
    for group, widest in readings.visited(groups):
        chosen = ranking[group]
        offset = torch.arange(widest, device=start.device)
        begin = start.index_select(0, chosen)[:, None]
        own_line = line.index_select(0, chosen)
        place = (begin + offset).clamp_max_(sources - 1).add_(own_line[:, None], alpha=sources)
        own_low = low.index_select(0, chosen) - begin
        own_high = high.index_select(0, chosen) - begin
        yield KeyStretches(
            own_line,
            token.index_select(0, chosen),
            gathered(key_order, place),
            _within(offset, own_low, own_high, dtype),
            None if real is None else real.index_select(0, chosen),
        )


def _groups(widths: list[int], most: int) -> list[tuple[slice, int]]:
    """Returns tiles that are computed together, each group with the keys of its widest.

    Args:
        widths: of the tiles, the widest first; tiles of width 0 are left out.
        most: keys of all tiles of a group, but for a single tile.
    """
    groups = []
    first = 0
    while first < len(widths) and widths[first] > 0:
        widest = widths[first]
        together = max(1, most // widest)
        groups.append((slice(first, first + together), widest))
        first += together
    return groups


def gathered(numbers: Tensor, index: Tensor) -> Tensor:
    """[n] at [...] -> [...]."""
    return numbers.index_select(0, index.flatten()).view_as(index)  # quicker than numbers[index]


def _within(offset: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, t, s]: 1 where low <= offset < high, else 0."""
    # Arithmetic of small numbers: comparisons and selections take several times as long.
    offset = offset.to(dtype)
    from_low = offset - (low.to(dtype) - 1)[..., None]
    below_high = high.to(dtype)[..., None] - offset
    return torch.minimum(from_low, below_high, out=from_low).clamp_(0, 1)


def _tiled(x: Tensor, more: int, side: int, fill: float) -> Tensor:
    """[L, T] -> [L, n, side], with `more` fillers at the end of a line."""
    return F.pad(x, (0, more), value=fill).unflatten(1, (-1, side))
