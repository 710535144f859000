"""Finds the summaries of blocks by number, in one look at a table for each.

Letters: B rows, T queries, S keys, K numbers of a query.
"""

import torch
from torch import Tensor

from models.span import PADDING, Span


class BlockLookup:
    """Table of where the summaries of a query's document lie among the keys at hand.

    The table has a place for every block between the first and the last of each document here, so
    that it serves any part of a row, at most as long as the row has blocks.

    Args:
        span: addresses [B, T] of queries.
        kv_span: addresses [B, S] of keys; a summary has that of the last token of its block.
        is_summary: [B, S] bool.
        block: tokens in a block.

    Attributes (int32, which takes half of the time of int64):
        table: [n + 1] index of a summary among B S, or -1; the last is that of no block.
        lowest, highest: [B, T, 1] blocks of a query's document that are at hand and complete.
        shift: [B, T, 1] from the number of a block to its place in the table.
        complete: [B, T] number of complete blocks of the document, here or elsewhere.
    """

    def __init__(self, span: Span, kv_span: Span, is_summary: Tensor, block: int):
        rows = torch.arange(span.shape[0], device=span.pos.device)[:, None]
        documents = torch.cat([span.doc, kv_span.doc], 1).max() + 1
        key = (is_summary & (kv_span.doc != PADDING)).flatten().nonzero()[:, 0]
        number = (kv_span.pos // block).flatten()[key]
        key_document = (rows * documents + kv_span.doc).flatten()[key]
        found, document = key_document.unique(return_inverse=True)
        first = torch.full_like(found, torch.iinfo(found.dtype).max)
        first.scatter_reduce_(0, document, number, "amin")
        last = torch.zeros_like(found).scatter_reduce_(0, document, number, "amax")
        ends = (last - first + 1).cumsum(0)
        start = ends - (last - first + 1)
        self.none = int(ends[-1]) if len(found) else 0
        self.table = key.new_full((self.none + 1,), -1)
        self.table[(start - first)[document] + number] = key
        if not len(found):  # no query finds any, whatever stands here
            found, first, last, start = (found.new_zeros(1) for _ in range(4))
            last -= 1
        own = rows * documents + span.doc
        at = torch.searchsorted(found, own).clamp_max_(len(found) - 1)
        here = span.valid() & (found[at] == own)
        self.complete = torch.div(span.pos + 1, block, rounding_mode="floor")
        highest = torch.where(here, torch.minimum(last[at], self.complete - 1), -1)
        self.lowest = first[at][..., None].int()
        self.highest = highest[..., None].int()
        self.shift = (start - first)[at][..., None].int()
        self.table = self.table.int()

    def find(self, numbers: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Finds blocks by number.

        Args:
            numbers: [B, t, K] int32, of blocks of the query's document; negative for none.
            part: which queries ask.

        Returns:
            (index [B, t, K] int32 among B S, present [B, t, K] bool): a block is present if it is
            among the keys and complete at its query. The index is 0 where it is not.
        """
        inside = numbers >= self.lowest[:, part]
        inside &= numbers <= self.highest[:, part]
        place = torch.where(inside, numbers + self.shift[:, part], self.none)
        index = self.table.index_select(0, place.flatten()).view_as(place)
        return index.clamp_min(0), index >= 0
