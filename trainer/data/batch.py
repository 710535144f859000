"""The tokens of one optimiser step with their addresses. Legend: R rows of all ranks, T context
length."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.loss import IGNORE
from models.span import GIVEN, TEXT, Span


class Batch(NamedTuple):
    """All rows of one step, on the CPU, the same on every rank; a row reads T + 1 tokens and
    predicts T.

    Attributes: tokens: [R, T+1] int64; 0 where there is none. doc: [R, T+1] int64, number of the
        document within its row; -1 = padding. pos: [R, T+1] int64, place in the document. role: [R,
        T+1] int64, a role of models.span; GIVEN = nobody predicts this token. aims: [R, T+1] int64,
        what is to be said at each token, IGNORE where nothing; None = the next token.
    """

    tokens: Tensor
    doc: Tensor
    pos: Tensor
    role: Tensor
    aims: Tensor | None = None

    def inputs(self) -> Tensor:
        """[R, T] int64, what the model reads."""
        return self.tokens[:, :-1]

    def span(self) -> Span:
        """[R, T] addresses of the inputs; to a model, a token that is given is text like any
        other."""
        role = self.role[:, :-1]
        return Span(
            pos=self.pos[:, :-1], doc=self.doc[:, :-1], role=torch.where(role == GIVEN, TEXT, role)
        )

    def targets(self) -> Tensor:
        """[R, T] int64: the aim, or the next token of the same document unless it is given; IGNORE
        where there is none."""
        if self.aims is not None:
            return self.aims[:, :-1]
        here = self.doc[:, :-1]
        there = self.doc[:, 1:]
        wanted = (there == here) & (here >= 0) & (self.role[:, 1:] != GIVEN)
        return torch.where(wanted, self.tokens[:, 1:], IGNORE)

    def predictions(self) -> int:
        """How many tokens are predicted: the step's global count of valid targets."""
        return int((self.targets() != IGNORE).sum())

    def numbered(self) -> "Batch":
        """The same rows, no two documents of which have one number: so every token of the step has
        an address of its own."""
        counts = (
            self.doc.amax(1, keepdim=True) + 1
        )  # PADDING is -1: a row of nothing else counts none
        return self._replace(
            doc=torch.where(self.doc < 0, self.doc, self.doc + counts.cumsum(0) - counts)
        )

    def part(self, first: int, last: int) -> "Batch":
        """Rows first .. last - 1, filled up with rows of padding where the batch has fewer."""
        missing = last - first - len(self.tokens[first:last])

        def filled(t: Tensor, fill: int) -> Tensor:
            part = t[first:last]
            return (
                part
                if missing <= 0
                else torch.cat([part, part.new_full((missing, part.shape[1]), fill)])
            )

        aims = None if self.aims is None else filled(self.aims, IGNORE)
        return Batch(
            *map(filled, (self.tokens, self.doc, self.pos, self.role), (0, -1, 0, 0)), aims=aims
        )
