"""The nearest entries of a store: found exactly, block by block, in float64; of equals the one that
stands first.

Letters: B rows, T queries, t of them at a time, S entries of a store, s of them at a time, H query
heads, G key heads, r = H / G, D key width, E value width, K found.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.masks.algebra import Mask, visible
from models.span import Span

CHUNK_SCORES = 1 << 22  # scores held at once
CHUNK_QUERIES = 256
NOWHERE = -1


class KeyValueStore(NamedTuple):
    """Tokens that may be found: keys [B, S, G, D], values [B, S, G, E] and their addresses [B, S];
    on any device."""

    key: Tensor
    value: Tensor
    span: Span

    @property
    def entries(self) -> int:
        """B S G: a token counts once for each key head."""
        return self.key.shape[:3].numel()


class Neighbors(NamedTuple):
    """What every query found so far, best first; of equals the one that stands first in the
    document.

    score [B, T, H, K] float64, minus infinity where fewer are seen; pos [B, T, H, K] int64 in the
    query's document; entry [B, T, H, K] int64, a number that says where it lies, or NOWHERE.
    """

    score: Tensor
    pos: Tensor
    entry: Tensor


def no_neighbors(q: Tensor, count: int) -> Neighbors:
    """Nothing found yet."""
    score = q.new_full((*q.shape[:3], count), -torch.inf, dtype=torch.float64)
    pos = torch.full_like(score, NOWHERE, dtype=torch.long)
    return Neighbors(score, pos, pos.clone())


def search(
    q: Tensor, stores: Sequence[KeyValueStore], mask: Mask, span: Span, best: Neighbors, first: int
) -> Neighbors:
    """The best of what was found so far and of the stores, whose entries are numbered from `first`
    on, end to end.

    Scores are compared in float64 and never held for all queries and entries at once.
    """
    for store in stores:
        groups = store.key.shape[2]
        for part in blocks(
            store.span.shape[1],
            CHUNK_SCORES // max(1, len(q) * q.shape[2] * min(CHUNK_QUERIES, q.shape[1])),
        ):
            kv_span = store.span.map(lambda t, p=part: t[:, p])
            key = store.key[:, part].to(q.device).permute(0, 2, 3, 1).double().contiguous()
            row, group = (torch.arange(n, device=q.device) for n in (len(q), groups))
            number = first + (row[:, None] * store.span.shape[1] + part.start) * groups + group
            for some in blocks(q.shape[1], CHUNK_QUERIES):
                seen = visible(mask, span.map(lambda t, s=some: t[:, s]), kv_span)[:, 0]
                if not bool(seen.any()):
                    continue
                held = Neighbors(*(_grouped(x[:, some], groups) for x in best))
                fresh = _better(
                    _grouped(q[:, some].double(), groups), key, seen, kv_span.pos, held, number
                )
                for whole, better in zip(best, fresh):
                    whole[:, some] = better.transpose(1, 2).flatten(2, 3)
        first += store.entries
    return best


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, t, H, ...] -> [B, G, t, H / G, ...]."""
    return x.unflatten(2, (groups, -1)).transpose(1, 2).contiguous()


def _better(
    q: Tensor, key: Tensor, seen: Tensor, pos: Tensor, held: Neighbors, number: Tensor
) -> Neighbors:
    """The best of what is held, [B, G, t, r, K], and of one block of a store.

    Args:
        q: [B, G, t, r, D]. key: [B, G, D, s]. seen: [B, t, s]. pos: [B, s].
        number: [B, G], of the first entry of the block; the next token's is G further.
    """
    scores = (q.flatten(2, 3) @ key).unflatten(2, q.shape[2:4])
    if not bool(seen.all()):
        scores.masked_fill_(~seen[:, None, :, None], -torch.inf)
    score, place = _candidates(scores, pos, held.score[..., -1:], held.score.shape[-1])
    where = pos[torch.arange(len(pos), device=pos.device)[:, None, None, None, None], place]
    entry = number[:, :, None, None, None] + place * number.shape[1]
    none = score == -torch.inf
    return merge_neighbors(
        held, Neighbors(score, where.masked_fill(none, NOWHERE), entry.masked_fill(none, NOWHERE))
    )


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


def merge_neighbors(a: Neighbors, b: Neighbors) -> Neighbors:
    """The best of both, as many as `a` has; their entries differ."""
    count = a.score.shape[-1]
    both = [torch.cat(pair, -1) for pair in zip(a, b)]
    order = both[1].sort(dim=-1, stable=True).indices
    score = both[0].gather(-1, order).sort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, score.indices[..., :count])
    return Neighbors(*(x.gather(-1, order) for x in both))


def blocks(count: int, size: int) -> Iterator[slice]:
    """0 .. count - 1 in stretches of `size`, at least 1."""
    for start in range(0, count, max(1, size)):
        yield slice(start, min(count, start + max(1, size)))
