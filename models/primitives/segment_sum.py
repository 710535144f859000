"""Segment sums: totals over a row or a document, and the running sum before each token.

Padding counts as 0. The primitive has no parameters. Letters: B rows, T tokens, F features.
"""

import torch
from torch import Tensor

from models.primitive import Primitive
from models.span import Span

SCOPES = ("row", "document")


class SegmentSum(Primitive):
    """Sums on one device, which holds whole rows.

    The summed tensor is [B, T] or [B, T, F], of integers or reals. The order is that of the tokens
    in the row.
    """

    continues_rows = True
    counts_flops = False  # additions only; the convention counts products of matrices

    def total(self, x: Tensor, span: Span, over: str = "row") -> Tensor:
        """Returns the sum over the row [B, 1, ...] or over each token's document [B, T, ...].

        Differentiable.

        Raises:
            ValueError: rows are read token by token, and their later tokens are not known.
        """
        validate_scope(over)
        if span.past is not None and span.past.continues_rows:
            raise ValueError(
                f"{self.place}: a sum over a whole {over} needs its later tokens, which decoding"
                " does not know"
            )
        x = _without_padding(x, span)
        if over == "row":
            return x.sum(1, keepdim=True)
        return within(x, starts(span, over))

    def before(self, x: Tensor, span: Span, over: str = "row") -> Tensor:
        """Returns the sum over the earlier tokens of the same row or document, [B, T, ...].

        Exact for integers. Reals are summed in float64 over the whole row, so that the sum of a
        document is exact to 1e-16 of the row's sum.
        """
        validate_scope(over)
        x = _without_padding(x, span)
        sums = exclusive_cumsum(x, starts(span, over))
        if span.past is None or not span.past.continues_rows:
            return sums
        return sums + self._earlier(x, span, over)

    def _earlier(self, x: Tensor, span: Span, over: str) -> Tensor:
        """Returns the sum over the tokens of earlier pieces, [B, T, ...], and stores the next."""
        wide = x.double() if x.is_floating_point() else x
        found = span.past.state(self.place)
        carried = torch.zeros_like(wide[:, 0]) if found is None else found
        opened = span.opens().cumsum(1) > 0
        if over == "row":
            opened = torch.zeros_like(opened)
        per_feature = [1] * (x.dim() - 2)
        opened = opened.view(*opened.shape, *per_feature)
        # Of the last document that began in this piece, or of all where none did.
        last = span.opens().flip(1).cumsum(1).flip(1) - span.opens().long() == 0
        if over == "row":
            last = torch.ones_like(last)
        own = torch.where(last.view(*last.shape, *per_feature), wide, 0).sum(1)
        span.past.store(self.place, own + torch.where(opened[:, -1], 0, carried))
        return torch.where(opened, 0, carried[:, None]).to(x.dtype)


def validate_scope(over: str) -> None:
    """Raises ValueError where `over` is not one of SCOPES."""
    if over not in SCOPES:
        raise ValueError(f"unknown over={over}; choose one of {', '.join(SCOPES)}")


def _without_padding(x: Tensor, span: Span) -> Tensor:
    """Replaces padding by 0; a product with 0 would let NaN through."""
    valid = span.valid()
    per_feature = [1] * (x.dim() - 2)
    return torch.where(valid.view(*valid.shape, *per_feature), x, 0)


def documents(span: Span, over: str) -> Tensor:
    """Returns the document of each position, [B, T] int64; 0 everywhere if `over` is the row.

    Padding inside or after a document belongs to it, and padding at the beginning to the first
    document: so a document is one unbroken stretch.
    """
    if over == "row":
        return torch.zeros_like(span.doc)
    valid = span.valid()
    index = torch.arange(span.shape[1], device=span.doc.device).expand_as(span.doc)
    last_valid = torch.where(valid, index, -1).cummax(1).values
    last_index = span.shape[1] - 1
    next_valid = torch.where(valid, index, last_index).flip(1).cummin(1).values.flip(1)
    return span.doc.gather(1, torch.where(last_valid >= 0, last_valid, next_valid))


def starts(span: Span, over: str, breaks: Tensor | None = None) -> Tensor:
    """Returns the index at which each token's stretch of its document or row begins, [B, T] int64.

    Args:
        breaks: [B, T] bool, further positions where a stretch begins.
    """
    doc = documents(span, over)
    index = torch.arange(span.shape[1], device=span.doc.device).expand_as(span.doc)
    first = torch.ones_like(doc[:, :1], dtype=torch.bool)
    opens = torch.cat([first, doc[:, 1:] != doc[:, :-1]], 1)
    if breaks is not None:
        opens = opens | breaks
    return torch.where(opens, index, 0).cummax(1).values


def within(x: Tensor, start: Tensor) -> Tensor:
    """Returns the sum over each token's stretch, [B, T, ...]; x is 0 at padding."""
    index = _expanded(start, x)
    return torch.zeros_like(x).scatter_add(1, index, x).gather(1, index)


def exclusive_cumsum(x: Tensor, start: Tensor) -> Tensor:
    """Returns the sum over the earlier tokens of each token's stretch, [B, T, ...]; x is 0 at
    padding."""
    # The running sum of a whole row is subtracted from itself: float32 would lose short documents.
    wide = x.double() if x.is_floating_point() else x
    running = wide.cumsum(1) - wide
    return (running - running.gather(1, _expanded(start, x))).to(x.dtype)


def _expanded(index: Tensor, x: Tensor) -> Tensor:
    """[B, T] -> the shape of x."""
    per_feature = [1] * (x.dim() - 2)
    return index.view(*index.shape, *per_feature).expand_as(x)
