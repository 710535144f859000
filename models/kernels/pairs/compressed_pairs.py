"""Pairs that compressed attention sees: a window of tokens, and the summaries of chosen blocks.

All heads share their keys, so a block of scores is (some queries with all of their heads) x keys.

Letters: B rows, T queries, S keys, H heads, K chosen blocks, N blocks computed together, t queries
of one, s keys of one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.kernels.pairs.stretches import SortedLines, tile_stretches
from models.scores import PairBlocks
from models.span import PADDING, Span


class ChosenPairs:
    """Finds the keys of queries by address.

    Args:
        span, kv_span: addresses [B, T] of queries and [B, S] of keys.
        is_summary: [B, S] bool; a key is a token, or a summary with the address of its last token.
        heads: H.
        most: scores to compute together.
        dtype: of what blocks say about pairs.
    """

    def __init__(
        self,
        span: Span,
        kv_span: Span,
        is_summary: Tensor,
        *,
        heads: int,
        most: int,
        dtype: torch.dtype,
    ):
        self.span = span
        self.heads = heads
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
            chosen: [B, T, K] numbers of blocks of the query's document; negative for none.
            block: tokens in a block.
        """
        key_address, key_order = self._sorted(self.is_key & self.is_summary)
        head = torch.arange(self.heads, device=chosen.device)
        row = torch.arange(self.rows, device=chosen.device)[:, None]
        together = max(1, self.most // (self.rows * self.heads * chosen.shape[-1]))
        for start in range(0, self.tokens, together):
            part = slice(start, start + together)
            index, present = self._find(chosen[:, part], part, block, key_address, key_order)
            if not index.shape[-1]:
                continue
            token = torch.arange(self.tokens, device=chosen.device)[part]
            query = (row * self.tokens + token).flatten() * self.heads
            yield PairBlocks(
                queries=query[:, None] + head,
                keys=(index + row[..., None] * self.sources).flatten(0, 1),
                seen=present.flatten(0, 1)[:, None].to(self.dtype),
            )

    def _sorted(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (addresses, numbers) of these keys in order; those of all others come last."""
        last = torch.iinfo(torch.int64).max
        addresses, order = torch.where(chosen, self.key_addresses, last).sort(1)
        return addresses, order

    def _find(
        self, numbers: Tensor, part: slice, block: int, key_address: Tensor, key_order: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Finds the summaries that some queries have chosen among the keys.

        Returns:
            (index [B, t, s] of keys, present [B, t, s] bool), where s is the largest number that a
            query finds here.
        """
        position = numbers * block + block - 1
        query_position = self.span.pos[:, part, None]
        possible = (numbers >= 0) & (position <= query_position)
        possible &= self.span.valid()[:, part, None]
        wanted = self.addresses[:, part, None] - query_position + position
        wanted = wanted.flatten(1)
        rank = torch.searchsorted(key_address, wanted).clamp_max_(self.sources - 1)
        present = possible & (key_address.gather(1, rank) == wanted).view_as(possible)
        index = key_order.gather(1, rank).view_as(possible)
        most = int(present.sum(-1).max())
        if most < present.shape[-1]:
            slot = present.int().argsort(dim=-1, descending=True, stable=True)[..., :most]
            index = index.gather(-1, slot)
            present = present.gather(-1, slot)
        return index, present
