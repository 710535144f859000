"""Pairs of tokens of equal hashes, found by sorting tokens by bucket; for LSH attention.

In the order of (bucket, document, position) the keys that a query sees by one hash lie side by
side: its own chunk up to itself, and the chunk before.

Letters: B rows, T queries, S keys, H heads, L lines (a row and a head), N tiles computed together,
t queries of a tile, s keys of its stretch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from models.kernels.pairs.stretches import KeyStretches, SortedLines, gathered, tile_stretches
from models.scores import PairBlocks, Tensors
from models.span import PADDING, Span


class _Hashed(NamedTuple):
    """Numbers of tokens by line, [L, hashes, T or S] whole numbers.

    Attributes:
        place: order of the tokens by bucket, document and position; equal for equal addresses.
        group: number of bucket, document and chunk; the chunk before has the number before. Of
            floating point, which vector instructions subtract and multiply.
    """

    place: Tensor
    group: Tensor


class BucketPairs:
    """Finds the pairs of queries and keys that share a bucket, and are of near chunks.

    Args:
        query: (buckets, chunks), whole numbers [B, T, H, hashes].
        payload: the same of the keys, [B, S, H, hashes].
        span, kv_span: their addresses.
        alone: added to the logit of a token for itself.
        most: scores to compute together.
        dtype: of what is added to logits.
    """

    def __init__(
        self,
        query: Tensors,
        payload: Tensors,
        span: Span,
        kv_span: Span,
        *,
        alone: float,
        most: int,
        dtype: torch.dtype,
    ):
        self.heads = query[0].shape[2]
        self.hashes = query[0].shape[3]
        self.tokens = span.shape[1]
        self.sources = kv_span.shape[1]
        self.alone = alone
        self.most = most
        self.dtype = dtype
        self.queries, self.keys = _numbered(query, payload, span, kv_span)

    def blocks(self) -> Iterator[PairBlocks]:
        """Yields the pairs, one hash after the other; a pair belongs to the first that shows it."""
        for index in range(self.hashes):
            key_place, key_order = self.keys.place[:, index].sort()
            key_group = self.keys.group[:, index].gather(1, key_order)
            place, order = self.queries.place[:, index].sort()
            group = self.queries.group[:, index].gather(1, order)
            # chunks of a bucket are counted from 1, so that the group before the first is empty
            low = torch.searchsorted(key_group, group - 1)
            high = torch.searchsorted(key_place, place, right=True).masked_fill(group < 0, 0)
            lines = SortedLines(order, low, high, key_order)
            for tiles in tile_stretches(lines, self.most, self.dtype):
                yield self._block(tiles, index)

    def _block(self, tiles: KeyStretches, index: int) -> PairBlocks:
        line = tiles.line[:, None]
        token = line * (self.hashes * self.tokens) + tiles.token
        source = line * (self.hashes * self.sources) + tiles.source
        seen = tiles.seen
        for earlier in range(index):
            group = gathered(self.queries.group.view(-1), token + earlier * self.tokens)
            key_group = gathered(self.keys.group.view(-1), source + earlier * self.sources)
            torch.minimum(seen, _apart(group, key_group).to(self.dtype), out=seen)
        add = None
        if not index:  # of all hashes the first shows a token to itself
            place = gathered(self.queries.place.view(-1), token)
            key_place = gathered(self.keys.place.view(-1), source)
            itself = place[..., None] == key_place[:, None]
            add = itself.to(self.dtype).mul_(self.alone)
        row = line // self.heads
        head = line % self.heads
        return PairBlocks(
            queries=(row * self.tokens + tiles.token) * self.heads + head,
            keys=(row * self.sources + tiles.source) * self.heads + head,
            seen=seen,
            add=add,
            real=tiles.real,
        )


def _apart(group: Tensor, key_group: Tensor) -> Tensor:
    """[N, t, s]: 0 where a key's chunk is the query's or the one before, else 2 or more."""
    ahead = key_group[:, None] - group[..., None]
    return ahead.addcmul_(ahead, ahead)  # a (a + 1), which is 0 at 0 and at -1


def _numbered(
    query: Tensors,
    payload: Tensors,
    span: Span,
    kv_span: Span,
) -> tuple[_Hashed, _Hashed]:
    """Numbers queries and keys by what decides whether they see one another."""
    documents = torch.cat([span.doc, kv_span.doc], 1)
    positions = torch.cat([span.pos, kv_span.pos], 1)
    valid = documents != PADDING
    addresses = documents * (positions.max() + 1) + positions
    # equal addresses get equal ranks
    ranks = torch.searchsorted(addresses.sort(1).values, addresses)
    buckets = _by_line(torch.cat([query[0], payload[0]], 1))
    chunks = _by_line(torch.cat([query[1], payload[1]], 1))
    heads = query[0].shape[2]
    ranks = _for_lines(ranks, heads)
    valid = _for_lines(valid, heads)
    documents = _for_lines(documents.clamp_min(0), heads)
    most_documents = int(documents.max()) + 1
    most_chunks = int(chunks.max()) + 2
    place = buckets * addresses.shape[1] + ranks
    group = (buckets * most_documents + documents) * most_chunks + chunks + 1
    # Padding is seen by nobody: its keys come last of all, and its queries have no group.
    last = torch.iinfo(torch.int64).max
    last_group = most_documents * most_chunks * (int(buckets.max()) + 1)
    # float32 has all whole numbers up to 2^24, float64 up to 2^53
    group = group.to(torch.float32 if last_group < 1 << 24 else torch.float64)
    tokens = span.shape[1]
    key_valid = valid[..., tokens:]
    queries = _Hashed(
        torch.where(valid, place, last)[..., :tokens].contiguous(),
        torch.where(valid, group, -1)[..., :tokens].contiguous(),
    )
    keys = _Hashed(
        torch.where(key_valid, place[..., tokens:], last).contiguous(),
        torch.where(key_valid, group[..., tokens:], last_group).contiguous(),
    )
    return queries, keys


def _by_line(numbers: Tensor) -> Tensor:
    """[B, T, H, hashes] -> [B H, hashes, T] int64."""
    return numbers.long().permute(0, 2, 3, 1).flatten(0, 1)


def _for_lines(numbers: Tensor, heads: int) -> Tensor:
    """[B, T] -> [B H, 1, T]."""
    return numbers.repeat_interleave(heads, 0)[:, None]
