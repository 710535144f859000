"""Lookup: a store that some of a row's tokens make up; its entries are picked, brought to the
queries, and searched.

A leaf without parameters. Entries are in order of their address: a row numbers its documents in
order and pads its end.
Letters: B rows, T queries, S entries of the store, K found.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from models.masks.algebra import Mask, visible
from models.primitive import Primitive
from models.scores import Tensors
from models.span import PADDING, Span

# the role of an entry that stands for several tokens; its position is that of the last of them
SUMMARY = 16

CHUNK_SCORES = 1 << 22  # scores held at once while searching


class PickedBlocks(NamedTuple):
    """Some of the tokens at hand.

    Attributes:
        index: [B, S] int64, where they lie among the tokens at hand; 0 where there is none.
        span: [B, S] their addresses with the role SUMMARY; padding where there is none.
        joint: [B, T + S] the addresses of all tokens at hand, then theirs.
    """

    index: Tensor
    span: Span
    joint: Span


@dataclass(frozen=True)
class BlockEnds:
    """Chooses the last token of each block of `block` positions of a document: where a block is
    complete."""

    block: int

    def __call__(self, span: Span) -> Tensor:
        """[B, T] bool."""
        return span.valid() & (span.pos % self.block == self.block - 1)

    def most(self, tokens: int) -> int:
        """How many there can be among so many tokens: all one document."""
        return max(1, tokens // self.block)


class BlockTopK(Primitive):
    """Searches a store on one device, where every entry is at hand."""

    counts_flops = False  # a search chooses entries; what reads them is a Softmax, which counts

    def pick(self, span: Span, choose: BlockEnds) -> PickedBlocks:
        """The tokens that `choose` is true of, as a store."""
        if ("pick", choose) not in span.plans:
            size = (
                choose.most(span.shape[1]) if span.pos.is_meta else None
            )  # sizes are counted without addresses
            span.plans["pick", choose] = picked_blocks(span, choose(span), size)
        return span.plans["pick", choose]

    def bring(
        self, payload: Tensors, mask: Mask, *, span: Span, kv_span: Span
    ) -> tuple[Tensors, Span]:
        """Every entry `of` that a query `at` may see under `mask` (of all heads alike), in order of
        address.

        Args:
            payload: tensors [B, S, ...] of the entries.

        Returns:
            (tensors [B, S', ...], addresses [B, S']); differentiable. More may come than can be
            seen.
        """
        return payload, kv_span

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
        """The `count` entries of highest score for each query, among those it sees; of equals the
        first.

        Args:
            score: (query tensors [B, T, ...], entry tensors [B, S, ...]) -> [B, T, S]; computed and
                compared in float64.

        Returns:
            (scores [B, T, K] float64, minus infinity where fewer are seen; positions [B, T, K]
            int64 of the entries in the query's document, -1 where fewer are seen). Without
            gradients: a choice has none.
        """
        with torch.no_grad():
            entries, inner_span = self.bring(payload, mask, span=span, kv_span=kv_span)
            entries = [e.double() for e in entries]
            rows, size = inner_span.shape
            scores = query[0].new_full((*span.shape, count), -torch.inf, dtype=torch.float64)
            found = torch.full_like(scores, -1, dtype=torch.long)
            step = max(1, CHUNK_SCORES // max(1, rows * size))
            for start in range(0, span.shape[1], step):
                part = slice(start, start + step)
                values = score([q[:, part].double() for q in query], entries)
                seen = visible(mask, span.map(lambda t, p=part: t[:, p]), inner_span)[:, 0]
                values = values.masked_fill(~seen, -torch.inf)
                value, index = (
                    x[..., :count] for x in values.sort(dim=-1, descending=True, stable=True)
                )
                where = inner_span.pos[:, None].expand(-1, index.shape[1], -1).gather(-1, index)
                scores[:, part, : value.shape[-1]] = value
                found[:, part, : value.shape[-1]] = where.masked_fill(value == -torch.inf, -1)
        return scores, found


def picked_blocks(span: Span, chosen: Tensor, size: int | None = None) -> PickedBlocks:
    """The tokens where `chosen` [B, T] is true, filled up to `size` (by default as many as the
    fullest row has)."""
    counts = chosen.sum(1, keepdim=True)
    size = max(1, int(counts.max())) if size is None else size
    index = (~chosen).long().argsort(dim=1, stable=True)[:, :size]
    if index.shape[1] < size:
        index = torch.cat([index, index.new_zeros(len(index), size - index.shape[1])], 1)
    there = torch.arange(size, device=index.device) < counts
    index = index.masked_fill(~there, 0)
    inner_span = Span(
        span.pos.gather(1, index).masked_fill(~there, 0),
        span.doc.gather(1, index).masked_fill(~there, PADDING),
        torch.full_like(index, SUMMARY),
    )
    return PickedBlocks(index, inner_span, joint(span, inner_span))


def joint(a: Span, b: Span) -> Span:
    """The addresses of `a`, then those of `b`; forgets the cut."""
    return Span(
        torch.cat([a.pos, b.pos], 1), torch.cat([a.doc, b.doc], 1), torch.cat([a.role, b.role], 1)
    )


def keys(span: Span) -> Tensor:
    """[B, T] int64 that grow with the address; padding comes last."""
    return torch.where(span.valid(), (span.doc << 40) + span.pos, torch.iinfo(torch.int64).max)


def find(what: Span, among: Span) -> tuple[Tensor, Tensor]:
    """Where tokens lie: (index [B, T] into `among`, there [B, T] bool); the index is of no use
    where there is False."""
    if not among.shape[1]:  # of rows of padding alone nothing is brought
        nowhere = torch.zeros_like(what.pos)
        return nowhere, nowhere.bool()
    order = keys(among).argsort(1)
    sorted_keys = keys(among).gather(1, order)
    wanted = keys(what)
    place = torch.searchsorted(sorted_keys.contiguous(), wanted.contiguous()).clamp_max(
        order.shape[1] - 1
    )
    return order.gather(1, place), (sorted_keys.gather(1, place) == wanted) & what.valid()


def take(x: Tensor, index: Tensor) -> Tensor:
    """[B, S, ...] at [B, N] -> [B, N, ...]; zeros where S is 0."""
    if not x.shape[1]:  # a sum, so that every rank builds the same graph
        return x.sum(1, keepdim=True, dtype=x.dtype).expand(-1, index.shape[1], *x.shape[2:])
    return x.gather(
        1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:])
    )


def moved(span: Span, by: Tensor | int) -> Span:
    """The addresses `by` positions later in the same documents."""
    return replace(span, pos=span.pos + by, sharding=None, plans={})
