"""Block top-k: a store made of some tokens of a row, which every query searches exactly.

Three steps, each of which a driver may do its own way: `pick` chooses the entries, `bring` takes
them to the queries, and `best` searches them. The primitive has no parameters. Entries are in order
of their address: a row numbers its documents in order and pads its end.

Letters: B rows, T queries, S entries of the store, K results for each query.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.counter_rng import DOC_BITS
from models.kernels.pairs import readings
from models.masks.algebra import Mask, visible
from models.masks.basic import Causal, SameDocument
from models.plans import planned
from models.primitive import Primitive
from models.scores import Tensors
from models.span import PADDING, Span

# Role of an entry that stands for several tokens; its position is that of the last of them.
SUMMARY = 16

# Scores in memory at once while searching: on a CPU not many more than its cache holds.
CHUNK_SCORES = 1 << 22
CHUNK_SCORES_CPU = 1 << 19

EARLIER = Causal() & SameDocument()


class PickedBlocks(NamedTuple):
    """The tokens of a row that make up a store.

    Attributes:
        index: [B, S] int64, their index in the row; 0 for an empty entry.
        span: [B, S] their addresses with the role SUMMARY; padding for an empty entry.
        joint: [B, T + S] the addresses of the whole row, then theirs.
    """

    index: Tensor
    span: Span
    joint: Span


@dataclass(frozen=True)
class BlockEnds:
    """Chooses the last token of each block of `block` positions of a document.

    There a block is complete, so a summary may be read from then on without looking ahead.
    """

    block: int

    def __call__(self, span: Span) -> Tensor:
        """[B, T] bool."""
        return span.valid() & (span.pos % self.block == self.block - 1)

    def most(self, tokens: int) -> int:
        """Returns the largest possible number of block ends in a row of `tokens` tokens."""
        return max(1, tokens // self.block)


class BlockTopK(Primitive):
    """Searches a store on one device, which holds every entry."""

    continues_rows = True
    counts_flops = False  # a search chooses entries; what reads them is a Softmax, which counts

    @planned
    def pick(self, span: Span, choose: BlockEnds) -> PickedBlocks:
        """Returns the tokens for which `choose` is true, as a store."""

        def build() -> PickedBlocks:
            size = None
            if span.pos.is_meta:
                # Without numbers the block ends cannot be counted; cost estimates take the maximum.
                size = choose.most(span.shape[1])
            return picked_blocks(span, choose(span), size)

        return span.cache.get(("pick", choose), build)

    def bring(
        self, payload: Tensors, mask: Mask, *, span: Span, kv_span: Span
    ) -> tuple[Tensors, Span]:
        """Returns every entry that a query may see, in order of address; differentiable.

        Args:
            payload: tensors [B, S, ...] of the entries.
            mask: alike for all heads.
            span: addresses of the queries.
            kv_span: addresses of the entries.

        Returns:
            (tensors [B, S', ...], addresses [B, S']). More entries may come than can be seen.
        """
        # Addresses of entries are made anew and have no past; those of tokens at hand have it.
        past = span.past or kv_span.past
        if past is None:
            return payload, kv_span
        return past.extend(self.place, payload, kv_span, mask, shared=True)

    def best(
        self,
        score: Callable[..., Tensor],
        query: Tensors,
        payload: Tensors,
        mask: Mask,
        *,
        span: Span,
        kv_span: Span,
        count: int,
    ) -> tuple[Tensor, Tensor]:
        """Returns the `count` visible entries of highest score for each query, in order of address.

        Of equal scores the earliest entry wins, so that one device and many ranks choose alike.

        Args:
            score: (query tensors [B, T, ...], entry tensors [B, S, ...]) -> a new tensor [B, T, S];
                computed and compared in float64.

        Returns:
            (scores [B, T, K] float64, minus infinity where fewer are seen; positions [B, T, K]
            int64 of the entries in the query's document, -1 where fewer are seen, last). Without
            gradients: a choice has none.
        """
        with torch.no_grad():
            entries, entry_span = self.bring(payload, mask, span=span, kv_span=kv_span)
            entries = [entry.double() for entry in entries]
            rows, size = entry_span.shape
            scores = query[0].new_full((*span.shape, count), -torch.inf, dtype=torch.float64)
            positions = torch.full_like(scores, -1, dtype=torch.long)
            most = CHUNK_SCORES_CPU if scores.is_cpu else CHUNK_SCORES
            step = max(1, most // max(1, rows * size))
            stretches = _stretches(mask, span, entry_span, step)
            chunks = list(zip(range(0, span.shape[1], step), stretches))
            for start, stretch in readings.visited(chunks):
                low, high = stretch.low, stretch.high
                if low == high:
                    continue
                part = slice(start, start + step)
                part_query = [tensor[:, part].double() for tensor in query]
                part_span = span.map(lambda addresses, part=part: addresses[:, part])
                some = entry_span.map(lambda addresses, a=low, b=high: addresses[:, a:b])
                part_scores = score(part_query, [entry[:, low:high] for entry in entries])
                for a, b in stretch.doubtful:
                    few = entry_span.map(lambda addresses, a=a, b=b: addresses[:, a:b])
                    hidden = ~visible(mask, part_span, few)[:, 0]
                    part_scores[..., a - low : b - low].masked_fill_(hidden, -torch.inf)
                value, index = best_of(part_scores, count)
                entry_pos = some.pos[:, None].expand(-1, index.shape[1], -1)
                position = entry_pos.gather(-1, index).masked_fill(value == -torch.inf, -1)
                scores[:, part, : value.shape[-1]] = value
                positions[:, part, : value.shape[-1]] = position
        return scores, positions


class _Stretch(NamedTuple):
    """Entries [low, high) that some queries may see, and [first, last) of those that some of these
    queries do not see."""

    low: int
    high: int
    doubtful: tuple[tuple[int, int], ...]


def _stretches(mask: Mask, span: Span, entry_span: Span, step: int) -> list[_Stretch]:
    """Returns the entries that each `step` queries may see.

    Args:
        mask: EARLIER, under which entries in order of address lie side by side; else all are named.
        span: addresses of the queries, [B, T].
        entry_span: addresses of the entries, [B, S].
        step: queries of a chunk; the last may have fewer.
    """
    size = entry_span.shape[1]
    addresses = keys(entry_span)
    if (
        mask != EARLIER
        or span.pos.is_meta
        or not bool((addresses[:, 1:] >= addresses[:, :-1]).all())
    ):
        return [_Stretch(0, size, ((0, size),))] * -(-span.shape[1] // step)
    own = keys(span)
    low = torch.searchsorted(addresses, (own - span.pos).contiguous())
    high = torch.searchsorted(addresses, own.contiguous(), right=True)
    # a query of padding sees none: all entries are doubtful beside it
    low = torch.where(span.valid(), low, size)
    high = torch.where(span.valid(), high, 0)
    found = []
    for lows, highs in zip(low.split(step, 1), high.split(step, 1)):
        first, first_of_last, last_of_first, last = (
            int(edge) for edge in (lows.min(), lows.max(), highs.min(), highs.max())
        )
        first = min(first, last)
        edges = ((first, min(first_of_last, last)), (max(first, last_of_first), last))
        found.append(_Stretch(first, last, tuple((a, b) for a, b in edges if a < b)))
    return found


def best_of(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the `count` highest scores and where they are, in order of place; the first of equals
    wins.

    Args:
        scores: [..., S]; minus infinity for none.

    Returns:
        (scores [..., K], indices [..., K]), where K is S if that is less. None comes last, as minus
        infinity with any index.
    """
    count = min(count, scores.shape[-1])
    lines = scores.reshape(-1, scores.shape[-1])
    if scores.is_cpu and type(scores) is Tensor:
        found = _best_by_threshold(lines, count)
    else:
        found = _best_by_rank(lines, count)
    value, index = (x.view(*scores.shape[:-1], count) for x in found)
    return value, index


def _best_by_threshold(lines: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`best_of` of [L, S] on a CPU: what is at least as high as the last of the best.

    NumPy finds that one with vector instructions, in a seventh of the time of `topk`.
    """
    number, size = lines.shape
    lowest = torch.finfo(lines.dtype).min  # less is none
    place = size - count
    least = torch.from_numpy(np.partition(lines.numpy(), place, axis=-1)[:, place])[:, None]
    good = lines >= least.clamp(min=lowest)
    counts = good.sum(-1)
    if bool((counts > count).any()):
        many = (counts > count).nonzero()[:, 0]
        better = lines[many] > least[many]
        equal = good[many] & ~better
        room = count - better.sum(-1, keepdim=True)
        good[many] = better | (equal & (equal.cumsum(-1) <= room))
        counts = counts.clamp(max=count)
    # numpy.flatnonzero takes a fraction of the time of Tensor.nonzero
    where = torch.from_numpy(np.flatnonzero(good.numpy()))
    start = torch.arange(number)[:, None] * size
    if len(where) == number * count:
        index = where.view(number, count)
        return lines.take(index), index - start
    slot = torch.arange(len(where)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    slot += torch.arange(number).repeat_interleave(counts) * count
    value = lines.new_full((number * count,), -torch.inf)
    index = torch.zeros(number * count, dtype=torch.long)
    value[slot] = lines.take(where)
    index[slot] = where % size
    return value.view(number, count), index.view(number, count)


def _best_by_rank(lines: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`best_of` of [L, S] by operations that every device has, without numbers too."""
    size = lines.shape[-1]
    # `topk` is several times faster than a sort, and leaves the order of equals open: where one
    # more score equals the last chosen, a sort chooses among them.
    value, index = lines.topk(min(count + 1, size), dim=-1)
    if size > count and not lines.is_meta:
        last = value[..., count - 1]
        is_open = (value[..., count] == last) & (last > -torch.inf)
        if bool(is_open.any()):
            ranked = lines.sort(dim=-1, descending=True, stable=True).indices[..., : count + 1]
            index = torch.where(is_open[..., None], ranked, index)
    index = index[..., :count]
    is_none = lines.gather(-1, index) == -torch.inf
    index = index.masked_fill(is_none, size).sort(dim=-1).values
    is_none = index == size
    index = index.masked_fill(is_none, 0)
    return lines.gather(-1, index).masked_fill(is_none, -torch.inf), index


def picked_blocks(span: Span, chosen: Tensor, size: int | None = None) -> PickedBlocks:
    """Returns the tokens where `chosen` [B, T] is true, padded to `size` entries.

    Args:
        size: S; by default the number of chosen tokens of the fullest row.
    """
    counts = chosen.sum(1, keepdim=True)
    if size is None:
        size = max(1, int(counts.max()))
    # Sorting by "not chosen" puts the chosen tokens first and keeps their order.
    index = (~chosen).long().argsort(dim=1, stable=True)[:, :size]
    if index.shape[1] < size:
        index = torch.cat([index, index.new_zeros(len(index), size - index.shape[1])], 1)
    filled = torch.arange(size, device=index.device) < counts
    index = index.masked_fill(~filled, 0)
    entry_span = Span(
        span.pos.gather(1, index).masked_fill(~filled, 0),
        span.doc.gather(1, index).masked_fill(~filled, PADDING),
        torch.full_like(index, SUMMARY),
    )
    return PickedBlocks(index, entry_span, joint(span, entry_span))


def joint(a: Span, b: Span) -> Span:
    """Concatenates the addresses of `a` and `b`; the result has no sharding."""
    return Span(
        torch.cat([a.pos, b.pos], 1),
        torch.cat([a.doc, b.doc], 1),
        torch.cat([a.role, b.role], 1),
    )


def keys(span: Span) -> Tensor:
    """Returns sort keys that grow with the address, [B, T] int64; padding comes last."""
    last = torch.iinfo(torch.int64).max
    return torch.where(span.valid(), (span.doc << DOC_BITS) + span.pos, last)


def find(what: Span, among: Span) -> tuple[Tensor, Tensor]:
    """Finds tokens by address.

    Returns:
        (index [B, T] into `among`, present [B, T] bool); the index is arbitrary where `present` is
        False.
    """
    if not among.shape[1]:  # rows of padding alone bring no entries
        nowhere = torch.zeros_like(what.pos)
        return nowhere, nowhere.bool()
    among_keys = keys(among)
    order = among_keys.argsort(1)
    sorted_keys = among_keys.gather(1, order)
    wanted = keys(what)
    rank = torch.searchsorted(sorted_keys.contiguous(), wanted.contiguous())
    rank = rank.clamp_max(order.shape[1] - 1)
    present = (sorted_keys.gather(1, rank) == wanted) & what.valid()
    return order.gather(1, rank), present


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gathers tokens: [B, S, ...] at [B, N] -> [B, N, ...]; zeros where S is 0."""
    if not x.shape[1]:
        # A sum over nothing, so that every rank builds the same graph.
        return x.sum(1, keepdim=True, dtype=x.dtype).expand(-1, index.shape[1], *x.shape[2:])
    per_feature = [1] * (x.dim() - 2)
    index = index.view(*index.shape, *per_feature).expand(*index.shape, *x.shape[2:])
    return x.gather(1, index)


def moved(span: Span, by: Tensor | int) -> Span:
    """Returns the addresses `by` positions later in the same documents."""
    return span.with_pos(span.pos + by).with_sharding(None)
