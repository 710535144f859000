"""Rows of uneven length, whole and in pieces: what a decoder is given."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from models.span import PADDING, Span

# Documents of three rows. Cuts fall inside them, on their ends, and right after a document of one
# token.
LENGTHS = ((13, 1, 11), (3, 20, 1, 2), (9,))
# For each row the tokens of its pieces; then steps of one token until the row ends. The third row
# ends long before the others and has no token in their steps.
PIECES = ((6, 7, 9), (9, 3, 3), (2, 7))


def addresses(lengths: Sequence[Sequence[int]] = LENGTHS) -> Span:
    """[B, T] of rows made of these documents, padded on the right."""
    rows = []
    longest = max(sum(row) for row in lengths)
    for row in lengths:
        pos = [position for length in row for position in range(length)]
        doc = [number for number, length in enumerate(row) for _ in range(length)]
        missing = longest - len(pos)
        rows.append((pos + [0] * missing, doc + [PADDING] * missing))
    return Span.of(torch.tensor([pos for pos, _ in rows]), torch.tensor([doc for _, doc in rows]))


def cut(span: Span, first: Sequence[Sequence[int]] = PIECES) -> Iterator[Tensor]:
    """Yields the index [B, n] of each piece into the rows, -1 where a row has fewer tokens.

    Args:
        first: for each row the tokens of its first pieces; the rest comes one by one.
    """
    left = span.valid().sum(1).tolist()
    done = [0] * len(left)
    number = 0
    while any(left):
        sizes = []
        for row, rest in enumerate(left):
            wanted = first[row][number] if number < len(first[row]) else 1
            sizes.append(min(wanted, rest))
        piece = torch.full((len(left), max(1, *sizes)), -1)
        for row, size in enumerate(sizes):
            piece[row, :size] = torch.arange(done[row], done[row] + size)
            done[row] += size
            left[row] -= size
        number += 1
        yield piece


def taken(x: Tensor, index: Tensor, fill: float) -> Tensor:
    """[B, T, ...] at an index as `cut` yields it -> [B, n, ...]; `fill` where it is -1."""
    there = index >= 0
    per_feature = [1] * (x.dim() - 2)
    wide = index.clamp_min(0).view(*index.shape, *per_feature)
    values = x.gather(1, wide.expand(*index.shape, *x.shape[2:]))
    return values.masked_fill(~there.view(*index.shape, *per_feature), fill)


def piece_span(span: Span, index: Tensor) -> Span:
    """The addresses of a piece."""
    return Span(
        taken(span.pos, index, 0), taken(span.doc, index, PADDING), taken(span.role, index, 0)
    )


def put(whole: Tensor, index: Tensor, part: Tensor) -> None:
    """Writes a piece [B, n, ...] to its place in the rows [B, T, ...]."""
    row, token = (index >= 0).nonzero(as_tuple=True)
    whole[row, index[row, token]] = part[row, token]
