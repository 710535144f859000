"""Tally: sums over the tokens of a row or of a document, and what has been summed before a token.
Padding counts nothing.

A leaf without parameters. Letters: B rows, T tokens, F features.
"""

import torch
from torch import Tensor

from models.primitive import Primitive
from models.span import Span

SCOPES = ("row", "document")


class SegmentSum(Primitive):
    """One device: whole rows are at hand.

    x is [B, T] or [B, T, F], whole numbers or real. Order is that of the tokens in the row.
    """

    counts_flops = False  # additions only; the convention counts products of matrices

    def total(self, x: Tensor, span: Span, over: str = "row") -> Tensor:
        """What the row, or the token's document, adds up to: [B, 1, ...], or [B, T, ...] over
        documents. Differentiable."""
        validate_scope(over)
        x = _held(x, span)
        return x.sum(1, keepdim=True) if over == "row" else within(x, starts(span, over))

    def before(self, x: Tensor, span: Span, over: str = "row") -> Tensor:
        """[B, T, ...]: the sum over the tokens before this one in its row or document. Exact for
        whole numbers.

        Real numbers are summed in float64 over the whole row, so that what a document gets is exact
        to 1e-16 of the row's sum.
        """
        validate_scope(over)
        return exclusive_cumsum(_held(x, span), starts(span, over))


def validate_scope(over: str) -> None:
    """Raises ValueError where sums over such a thing are not kept."""
    if over not in SCOPES:
        raise ValueError(f"sums over a {over} are not kept; choose one of {', '.join(SCOPES)}")


def _held(x: Tensor, span: Span) -> Tensor:
    """x, nothing at padding."""
    valid = span.valid()
    return torch.where(valid.view(*valid.shape, *[1] * (x.dim() - 2)), x, 0)


def documents(span: Span, over: str) -> Tensor:
    """[B, T] int64: the document that each place belongs to; padding inside or before one belongs
    to it. 0 over rows."""
    if over == "row":
        return torch.zeros_like(span.doc)
    valid = span.valid()
    place = torch.arange(span.shape[1], device=span.doc.device).expand_as(span.doc)
    last = torch.where(valid, place, -1).cummax(1).values
    coming = torch.where(valid, place, span.shape[1] - 1).flip(1).cummin(1).values.flip(1)
    return span.doc.gather(1, torch.where(last >= 0, last, coming))


def starts(span: Span, over: str, breaks: Tensor | None = None) -> Tensor:
    """[B, T] int64: for each token the place where its unbroken stretch of one document (or of the
    row) begins.

    Args:
        breaks: [B, T] bool, further places where a stretch begins.
    """
    doc, place = (
        documents(span, over),
        torch.arange(span.shape[1], device=span.doc.device).expand_as(span.doc),
    )
    opens = torch.cat([torch.ones_like(doc[:, :1], dtype=torch.bool), doc[:, 1:] != doc[:, :-1]], 1)
    opens = opens if breaks is None else opens | breaks
    return torch.where(opens, place, 0).cummax(1).values


def within(x: Tensor, start: Tensor) -> Tensor:
    """[B, T, ...]: the sum over each token's stretch; x is 0 at padding."""
    index = _like(start, x)
    return torch.zeros_like(x).scatter_add(1, index, x).gather(1, index)


def exclusive_cumsum(x: Tensor, start: Tensor) -> Tensor:
    """[B, T, ...]: the sum over those tokens of each token's stretch that come before it; x is 0 at
    padding."""
    wide = x.double() if x.is_floating_point() else x
    line = wide.cumsum(1) - wide
    return (line - line.gather(1, _like(start, x))).to(x.dtype)


def _like(index: Tensor, x: Tensor) -> Tensor:
    return index.view(*index.shape, *[1] * (x.dim() - 2)).expand_as(x)
