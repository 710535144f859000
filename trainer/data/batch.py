"""The tokens of one optimiser step with their addresses. Legend: R rows of all ranks, T context length."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.loss import IGNORE
from models.span import Span


class Batch(NamedTuple):
    """All rows of one step, on the CPU, the same on every rank; a row reads T + 1 tokens and predicts T.

    Attributes:
        tokens: [R, T+1] int64; 0 where there is none.
        doc: [R, T+1] int64, number of the document; -1 = padding.
        pos: [R, T+1] int64, place in the document.
        role: [R, T+1] int64, a role of models.span.
    """

    tokens: Tensor
    doc: Tensor
    pos: Tensor
    role: Tensor

    def inputs(self) -> Tensor:
        """[R, T] int64, what the model reads."""
        return self.tokens[:, :-1]

    def span(self) -> Span:
        """[R, T] addresses of the inputs."""
        return Span(pos=self.pos[:, :-1], doc=self.doc[:, :-1], role=self.role[:, :-1])

    def targets(self) -> Tensor:
        """[R, T] int64: the next token of the same document, IGNORE where there is none."""
        here, there = self.doc[:, :-1], self.doc[:, 1:]
        return torch.where((there == here) & (here >= 0), self.tokens[:, 1:], IGNORE)

    def predictions(self) -> int:
        """How many tokens are predicted: the step's global count of valid targets."""
        return int((self.targets() != IGNORE).sum())

    def part(self, first: int, last: int) -> "Batch":
        """Rows first .. last - 1, filled up with rows of padding where the batch has fewer."""
        piece = Batch(*(t[first:last] for t in self))
        missing = last - first - len(piece.tokens)
        if missing <= 0:
            return piece
        fill = (0, -1, 0, 0)  # tokens, doc, pos, role
        return Batch(*(torch.cat([t, t.new_full((missing, t.shape[1]), value)]) for t, value in zip(piece, fill)))
