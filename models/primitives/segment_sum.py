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
            ValueError: rows are read token by token, and their later tokens are not known; or in
                pieces, and the sum is over a document or needs a gradient.
        """
        validate_scope(over)
        total = self._total(x, span, over)
        if span.past is None or not span.past.continues_rows:
            return total
        if over != "row":
            raise ValueError(
                f"{self.place}: a sum over a whole document needs its later tokens, which are not"
                " known"
            )
        return span.past.row_sum(self.place, total)

    def _total(self, x: Tensor, span: Span, over: str) -> Tensor:
        """Returns the sum over the tokens at hand."""
        x = _without_padding(x, span)
        if over == "row":
            return x.sum(1, keepdim=True)
        return within(x, starts(span, over))

    def count(self, span: Span, over: str = "row") -> Tensor:
        """Returns the tokens of the row [B, 1] or of each token's document [B, T], int64."""
        if span.past is not None:
            lengths = span.past.row_lengths(span, over)
            if lengths is not None:
                return lengths
        return self.total(span.valid().long(), span, over)

    def before(self, x: Tensor, span: Span, over: str = "row") -> Tensor:
        """Returns the sum over the earlier tokens of the same row or document, [B, T, ...].

        Exact for integers. Reals are summed in float64 over the whole row, so that the sum of a
        document is exact to 1e-16 of the row's sum.
        """
        validate_scope(over)
        sums = self._before(x, span, over)
        if span.past is None or not span.past.continues_rows:
            return sums
        return sums + self._earlier(_without_padding(x, span), span, over)

    def _before(self, x: Tensor, span: Span, over: str) -> Tensor:
        """Returns the sum over the earlier ones of the tokens at hand."""
        return exclusive_cumsum(_without_padding(x, span), starts(span, over))

    def _earlier(self, x: Tensor, span: Span, over: str) -> Tensor:
        """Returns the sum over the tokens of earlier pieces, [B, T, ...], and stores the next."""
        wide = x.double() if x.is_floating_point() else x
        found = span.past.state(self.place)
        carried = torch.zeros_like(wide[:, 0]) if found is None else found
        before, after, some = self._openings(span)
        if over == "row":
            before, after, some = (torch.zeros_like(number) for number in (before, after, some))
        # Of the last document that began in this piece, or of all where none did.
        own = self._over_ranks(torch.where(_wide(after == 0, x), wide, 0).sum(1))
        span.past.store(self.place, own + torch.where(_wide(some > 0, carried), 0, carried))
        return torch.where(_wide(before > 0, x), 0, carried[:, None]).to(x.dtype)

    def _openings(self, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        """Counts the documents that open up to a token [B, T], after it [B, T], and at all [B]."""
        opens = span.opens().long()
        before = opens.cumsum(1)
        some = opens.sum(1)
        return before, some[:, None] - before, some

    def _over_ranks(self, part: Tensor) -> Tensor:
        """Sums what each rank has of its own tokens."""
        return part


def validate_scope(over: str) -> None:
    """Raises ValueError where `over` is not one of SCOPES."""
    if over not in SCOPES:
        raise ValueError(f"unknown over={over}; choose one of {', '.join(SCOPES)}")


def _wide(flags: Tensor, like: Tensor) -> Tensor:
    """Adds dims of size 1 at the end, up to those of `like`."""
    return flags.view(*flags.shape, *[1] * (like.dim() - flags.dim()))


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
