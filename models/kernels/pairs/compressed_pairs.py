"""Pairs that compressed attention sees: a window of tokens, and the summaries of chosen blocks.

All heads share their keys, so a block of scores is (some queries with all of their heads) x keys.

Letters: B rows, T queries, S keys, H heads, K chosen blocks, N blocks computed together, t queries
of one, s keys of one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.kernels.pairs import readings
from models.kernels.pairs.block_lookup import BlockLookup
from models.kernels.pairs.stretches import SortedLines, tile_stretches
from models.scores import PairBlocks
from models.span import PADDING, Span


class ChosenPairs:
    """Finds the keys of queries by address.

    Args:
        span, kv_span: addresses [B, T] of queries and [B, S] of keys.
        is_summary: [B, S] bool; a key is a token, or a summary with the address of its last token.
        heads: H.
        channels: numbers of a key.
        most: scores, or numbers of keys that single queries gather, to compute together.
        dtype: of what blocks say about pairs.
    """

    def __init__(
        self,
        span: Span,
        kv_span: Span,
        is_summary: Tensor,
        *,
        heads: int,
        channels: int,
        most: int,
        dtype: torch.dtype,
    ):
        self.span = span
        self.kv_span = kv_span
        self.heads = heads
        self.channels = channels
        self.most = most
        self.dtype = dtype
        self.rows, self.tokens = span.shape
        self.sources = kv_span.shape[1]
        # one number for an address: no position runs into the next document
        self.stride = torch.maximum(span.pos.max(), kv_span.pos.max()) + 1
        self.addresses = span.doc * self.stride + span.pos
        self.key_addresses = kv_span.doc * self.stride + kv_span.pos
        self.is_summary = is_summary
        self.is_key = kv_span.doc != PADDING

    def window(self, window: int) -> Iterator[PairBlocks]:
        """Yields tiles of queries beside the last `window` tokens of each."""
        key_address, key_order = self._sorted(self.is_key & ~self.is_summary)
        address, order = self.addresses.sort(1)
        opens = address - self.span.pos.gather(1, order)  # the first token of the document
        first = torch.maximum(opens, address - window + 1)
        low = torch.searchsorted(key_address, first)
        high = torch.searchsorted(key_address, address, right=True)
        high = high.masked_fill(self.span.doc.gather(1, order) == PADDING, 0)
        lines = SortedLines(order, low, high, key_order)
        head = torch.arange(self.heads, device=order.device)
        for tiles in tile_stretches(lines, self.most, self.dtype, self.heads):
            row = tiles.line[:, None]
            query = ((row * self.tokens + tiles.token) * self.heads)[..., None] + head
            real = tiles.real
            yield PairBlocks(
                queries=query.flatten(1),
                keys=row * self.sources + tiles.source,
                seen=tiles.seen.repeat_interleave(self.heads, 1),
                real=None if real is None else real.repeat_interleave(self.heads, 1),
            )

    def chosen(self, chosen: Tensor, block: int) -> Iterator[PairBlocks]:
        """Yields a block for each query: its heads beside the summaries that it has chosen.

        Args:
            chosen: [B, T, K] int32 numbers of blocks of the query's document; negative for none.
            block: tokens in a block.
        """
        lookup = BlockLookup(self.span, self.kv_span, self.is_summary, block)
        head = torch.arange(self.heads, device=chosen.device)
        row = torch.arange(self.rows, device=chosen.device)[:, None]
        # blocks of few queries: beyond the cache of a core, but with half of the calls
        each = chosen.shape[-1] * max(self.heads, self.channels // 4)
        together = max(1, self.most // (self.rows * each))
        for start in readings.visited(range(0, self.tokens, together)):
            part = slice(start, start + together)
            index, present = _packed(lookup, chosen[:, part], part)
            if not index.shape[-1]:
                continue
            token = torch.arange(self.tokens, device=chosen.device)[part]
            query = (row * self.tokens + token).flatten() * self.heads
            yield PairBlocks(
                queries=query[:, None] + head,
                keys=index.flatten(0, 1),
                seen=None if present is None else present.flatten(0, 1)[:, None].to(self.dtype),
            )

    def _sorted(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (addresses, numbers) of these keys in order; those of all others come last."""
        last = torch.iinfo(torch.int64).max
        addresses, order = torch.where(chosen, self.key_addresses, last).sort(1)
        return addresses, order


def _packed(lookup: BlockLookup, numbers: Tensor, part: slice) -> tuple[Tensor, Tensor | None]:
    """Finds blocks by number and leaves out places [B, t, K] that no query needs.

    All are present where None is said so.
    """
    index, present = lookup.find(numbers, part)
    counts = present.sum(-1)
    fewest, most = readings.counts_of(counts, index.shape[-1], lookup, part)
    if fewest == index.shape[-1]:
        return index, None
    if most == index.shape[-1]:
        return index, present
    slot = torch.where(present, present.cumsum(-1) - 1, most)
    packed = index.new_zeros(*index.shape[:-1], most + 1).scatter_(-1, slot, index)[..., :most]
    return packed, torch.arange(most, device=index.device) < counts[..., None]
