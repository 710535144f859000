"""The tensors that pieces of a row leave to each other, and the record of the piece at hand.

Letters: B rows, S tokens, m of them that are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.masks.algebra import Bounds, Mask
from models.masks.later import bounds_of
from models.scores import Tensors
from models.span import PADDING, DerivedCache, Span

# What of a piece later pieces read: keys that a mask still shows, or so many of the last tokens.
ReadRule = Mask | int


@dataclass
class Chunk:
    """The tensors that one piece left under one name.

    Attributes:
        piece: its number.
        tensors: [B, m, ...], without a graph.
        span: their addresses.
        asked: gradients that later pieces have asked of them so far, at least in float32.
        read: by number of a later piece, whether it reads any of this.
    """

    piece: int
    tensors: list[Tensor]
    span: Span
    asked: list[Tensor | None]
    read: dict[int, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """Some of the tokens at hand.

    Attributes:
        index: [B, m] int64; None where all are taken.
        span: their addresses; padding where a row has fewer.
    """

    index: Tensor | None
    span: Span


@dataclass
class PassRecord:
    """The record of one piece, which lasts as long as the piece is at hand.

    Attributes:
        calls: payloads that each primitive has brought, in order.
        leaves: by name, of each chunk that was read its tensors, which ask for gradients.
        states: by name, the state that was read, as such a leaf.
        given: what the piece leaves, which of its tokens (all where None), and the gradient that
            was asked of those.
        over: whether forward is over: then a layer that is computed again changes nothing here.
    """

    span: Span
    calls: dict[str, list[Tensors]] = field(default_factory=dict)
    leaves: dict[str, list[tuple[Chunk, list[Tensor]]]] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)
    stored: set[str] = field(default_factory=set)
    given: list[tuple[Tensor, Tensor | None, Tensor | None]] = field(default_factory=list)
    derived: DerivedCache = field(default_factory=DerivedCache)
    over: bool = False


def kept_first(keep: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns (index [B, size] of the marked tokens, in order and after padding, filled)."""
    # Padding comes first: a convolution needs the last token right before the next piece.
    order = keep.to(torch.int8).argsort(dim=1, stable=True)
    index = order[:, order.shape[1] - size :]
    return index, keep.gather(1, index)


def kept_addresses(span: Span, index: Tensor, filled: Tensor) -> Span:
    """The addresses at an index; padding where it is not filled."""
    taken = span.map(lambda addresses: addresses.gather(1, index))
    return taken.with_doc(taken.doc.masked_fill(~filled, PADDING))


def bounds_after(row: Span, tokens: Sequence[int]) -> list[list[list[Bounds]]]:
    """For each piece and row the bounds of all queries after it: of the document that goes on, and
    of those to come."""
    fields = [tensor.numpy() for tensor in row.host().addresses()]
    found = []
    for border in np.cumsum(tokens).tolist():
        rows = []
        for number in range(row.shape[0]):
            pos, doc, role = (values[number] for values in fields)
            valid = doc != PADDING
            rest = valid.copy()
            rest[:border] = False
            before = doc[:border][valid[:border]]
            current = before[-1] if len(before) else PADDING
            parts = (rest & (doc == current), rest & (doc != current))
            rows.append([bounds_of((pos[p], doc[p], role[p])) for p in parts if p.any()])
        found.append(rows)
    return found


def lengths(row: Span, span: Span, over: str) -> Tensor:
    """Returns the tokens of whole rows [B, 1], or of the document of each token [B, S]."""
    if over == "row":
        return row.valid().sum(1, keepdim=True).to(span.doc.device)
    # Sorted, the tokens of a document lie between two searches.
    numbers = row.doc.to(span.doc.device).sort(1).values.contiguous()
    doc = span.doc.contiguous()
    first = torch.searchsorted(numbers, doc)
    return torch.searchsorted(numbers, doc, right=True) - first


def taken(x: Tensor, index: Tensor | None) -> Tensor:
    """[B, S, ...] at [B, m] -> [B, m, ...]."""
    if index is None:
        return x
    index = index.view(*index.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(*index.shape[:2], *x.shape[2:]))


def owned(x: Tensor) -> Tensor:
    """The numbers alone: no graph, and no larger storage that they are a view of."""
    x = x.detach()
    if x.untyped_storage().nbytes() > x.numel() * x.element_size():
        return x.clone(memory_format=torch.contiguous_format)
    return x


def leaves_of(chunk: Chunk, likes: Tensors) -> list[Tensor]:
    """The tensors of a chunk; those ask for a gradient that do so in the piece at hand."""
    leaves = []
    for tensor, like in zip(chunk.tensors, likes, strict=True):
        leaf = tensor.detach()
        leaves.append(leaf.requires_grad_() if like.requires_grad else leaf)
    return leaves


def added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Sums gradients at least in float32."""
    if gradient is None:
        return total
    if total is None:
        # A copy where the dtype is wide already: autograd may hand out a tensor that it shares.
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
    return total.add_(gradient)


def nothing(x: Tensor, span: Span) -> tuple[Tensor, Span]:
    return x[:, :0].detach(), span.map(lambda addresses: addresses[:, :0])


class Handed(torch.autograd.Function):
    """A loss, and the gradients of what its piece left beside it."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], loss: Tensor, *left: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        # Not scaled by the incoming gradient: an engine's factor is in them already.
        return None, grads[0], *ctx.gradients
