"""Exact nearest-neighbour search over stores of keys, block by block, in float64.

Of equal scores the entry with the lowest position wins.

Letters: B rows, T queries, t of them at a time, S entries of a store, s of them at a time, H query
heads, G key heads, r = H / G, D key width, E value width, K neighbours.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.masks.algebra import Mask, visible
from models.span import Span

CHUNK_SCORES = 1 << 22  # scores in memory at once
CHUNK_QUERIES = 256
NOWHERE = -1


class KeyValueStore(NamedTuple):
    """Searchable tokens on any device.

    Attributes:
        key: [B, S, G, D].
        value: [B, S, G, E].
        span: their addresses [B, S].
    """

    key: Tensor
    value: Tensor
    span: Span

    @property
    def entries(self) -> int:
        """B S G: a token counts once for each key head."""
        return self.key.shape[:3].numel()


class NearestKeys(NamedTuple):
    """The best entries of every query so far, best first.

    Attributes:
        score: [B, T, H, K] float64, minus infinity where fewer entries are visible.
        pos: [B, T, H, K] int64, position in the query's document.
        entry: [B, T, H, K] int64, the number of the entry, or NOWHERE.
    """

    score: Tensor
    pos: Tensor
    entry: Tensor


def no_neighbors(q: Tensor, count: int) -> NearestKeys:
    """Returns neighbours that any entry improves."""
    score = q.new_full((*q.shape[:3], count), -torch.inf, dtype=torch.float64)
    pos = torch.full_like(score, NOWHERE, dtype=torch.long)
    return NearestKeys(score, pos, pos.clone())


def search(
    q: Tensor,
    stores: Sequence[KeyValueStore],
    mask: Mask,
    span: Span,
    best: NearestKeys,
    first: int,
) -> NearestKeys:
    """Returns the best of `best` and of the stores.

    Scores are compared in float64 and never held for all queries and entries at once.

    Args:
        first: the number of the first entry; the stores are numbered from there, end to end.
    """
    query_block = min(CHUNK_QUERIES, q.shape[1])
    entries_at_once = CHUNK_SCORES // max(1, len(q) * q.shape[2] * query_block)
    for store in stores:
        tokens = store.span.shape[1]
        groups = store.key.shape[2]
        row = torch.arange(len(q), device=q.device)
        group = torch.arange(groups, device=q.device)
        for part in blocks(tokens, entries_at_once):
            kv_span = store.span.map(lambda addresses, part=part: addresses[:, part])
            key = store.key[:, part].to(q.device).permute(0, 2, 3, 1).double().contiguous()
            number = first + (row[:, None] * tokens + part.start) * groups + group
            for queries in blocks(q.shape[1], CHUNK_QUERIES):
                query_span = span.map(lambda addresses, queries=queries: addresses[:, queries])
                seen = visible(mask, query_span, kv_span)[:, 0]
                # Most blocks of a store belong to other documents, or come later.
                if not bool(seen.any()):
                    continue
                current = NearestKeys(*(_grouped(x[:, queries], groups) for x in best))
                grouped_queries = _grouped(q[:, queries].double(), groups)
                better = _better(grouped_queries, key, seen, kv_span.pos, current, number)
                for whole, improved in zip(best, better):
                    whole[:, queries] = improved.transpose(1, 2).flatten(2, 3)
        first += store.entries
    return best


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, t, H, ...] -> [B, G, t, H / G, ...]."""
    return x.unflatten(2, (groups, -1)).transpose(1, 2).contiguous()


def _better(
    q: Tensor, key: Tensor, seen: Tensor, pos: Tensor, current: NearestKeys, number: Tensor
) -> NearestKeys:
    """Returns the best of `current`, [B, G, t, r, K], and of one block of a store.

    Args:
        q: [B, G, t, r, D].
        key: [B, G, D, s].
        seen: [B, t, s].
        pos: [B, s].
        number: [B, G], of the first entry of the block; the next token's is G further.
    """
    scores = (q.flatten(2, 3) @ key).unflatten(2, q.shape[2:4])
    if not bool(seen.all()):
        scores.masked_fill_(~seen[:, None, :, None], -torch.inf)
    count = current.score.shape[-1]
    score, index = _candidates(scores, pos, current.score[..., -1:], count)
    rows = torch.arange(len(pos), device=pos.device)[:, None, None, None, None]
    position = pos[rows, index]
    entry = number[:, :, None, None, None] + index * number.shape[1]
    hidden = score == -torch.inf
    block = NearestKeys(
        score, position.masked_fill(hidden, NOWHERE), entry.masked_fill(hidden, NOWHERE)
    )
    return merge_neighbors(current, block)


def _candidates(scores: Tensor, pos: Tensor, least: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Those of scores [B, G, t, r, s] that may be among the best, as (scores, minus infinity where
    there are fewer; places).

    Once a query has found enough, few entries of a block are as good as the `least` of them, and
    those alone are picked out; sorting a block takes far longer than its products.
    """
    shape, size = scores.shape[:-1], scores.shape[-1]
    good = scores >= least.clamp_min(torch.finfo(scores.dtype).min)
    if int(good.count_nonzero()) <= 2 * count * shape.numel():
        line, place = good.view(-1, size).nonzero().unbind(1)
        numbers = torch.bincount(line, minlength=shape.numel())
        most = int(numbers.max())
        if most <= 4 * count:
            slot = (
                torch.arange(len(place), device=place.device) - (numbers.cumsum(0) - numbers)[line]
            )
            score = scores.new_full((len(numbers), most), -torch.inf)
            where = place.new_zeros(len(numbers), most)
            score[line, slot] = scores.view(-1, size)[line, place]
            where[line, slot] = place
            return score.view(*shape, most), where.view(*shape, most)
    return _highest(scores, pos[:, None, None, None].expand_as(scores), count)


def _highest(scores: Tensor, pos: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest along the last dim and where they are; of those equal to the last of
    them, the lowest `pos`."""
    score, place = scores.topk(min(count + 1, scores.shape[-1]))
    if scores.shape[-1] <= count:
        return score, place
    least = score[..., count - 1 : count]
    next_best = score[..., count:]
    score = score[..., :count]
    place = place[..., :count]
    if bool(((least == next_best) & (least > -torch.inf)).any()):
        tied = scores == least
        room = (score == least).sum(-1, keepdim=True)
        far = torch.iinfo(pos.dtype).max
        first = torch.where(tied, pos, far).topk(count, largest=False).values.gather(-1, room - 1)
        score, place = scores.masked_fill(tied & (pos > first), -torch.inf).topk(count)
    return score, place


def merge_neighbors(a: NearestKeys, b: NearestKeys) -> NearestKeys:
    """The best of both, as many as `a` has; their entries differ."""
    count = a.score.shape[-1]
    both = [torch.cat(pair, -1) for pair in zip(a, b)]
    order = both[1].sort(dim=-1, stable=True).indices
    score = both[0].gather(-1, order).sort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, score.indices[..., :count])
    return NearestKeys(*(x.gather(-1, order) for x in both))


def blocks(count: int, size: int) -> Iterator[slice]:
    """0 .. count - 1 in stretches of `size`, at least 1."""
    for start in range(0, count, max(1, size)):
        yield slice(start, min(count, start + max(1, size)))
