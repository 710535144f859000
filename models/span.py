"""Where tokens sit: their position inside a document, which document, and what they are."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TEXT, PREFIX, GLOBAL, READ, WRITE, GIVEN = range(
    6
)  # roles; GIVEN, which nobody predicts, is known to batches alone
PADDING = -1  # the document number of tokens that are none


@dataclass(frozen=True)
class Span:
    """The address of every token at hand, wherever the sequence was cut.

    Model code reads addresses from here and never works them out from a rank, so the same forward
    pass is right for a whole sequence, a shard, a zigzag of shards, or one decoded token.

    Attributes: pos: [B, T] int64, index of the token in its own document (0 opens one). doc: [B, T]
        int64, number of the document, another for every one of a row (in training: of a step);
        PADDING marks
            tokens that nothing may see.
        role: [B, T] int64, TEXT, PREFIX, GLOBAL, READ or WRITE.
        cut: how the row was cut over ranks (a parallel.sharding.SequenceSharding), or None where it
            was not. Opaque here.
        plans: what models.kernels.block_plan worked out for these queries, kept so that layers with
            equal masks share it.
        past: what the rows before left in these lanes (a models.carried_state.CarriedState), or
            None where nothing is carried.
    """

    pos: Tensor
    doc: Tensor
    role: Tensor
    sharding: Any = None
    plans: dict = field(default_factory=dict, compare=False, repr=False)
    past: Any = field(default=None, compare=False, repr=False)

    @staticmethod
    def of(pos: Tensor, doc: Tensor, role: Tensor | None = None) -> "Span":
        """A span of text; `role` defaults to TEXT everywhere."""
        return Span(pos, doc, torch.full_like(pos, TEXT) if role is None else role)

    @staticmethod
    def line(rows: int, tokens: int, device: Any = None) -> "Span":
        """One unbroken document per row."""
        pos = torch.arange(tokens, device=device).expand(rows, tokens)
        return Span.of(pos, torch.zeros_like(pos))

    def map(self, move: Any) -> "Span":
        """The span of the tokens that `move` picks or moves ([B, T] -> [B, T']); it forgets the
        cut."""
        return Span(move(self.pos), move(self.doc), move(self.role))

    def join(self, other: "Span") -> "Span":
        """The addresses of these tokens, then those of the other ones, of the same rows; joined
        where they are cut too."""
        pos, doc, role = (
            torch.cat(two, 1) for two in zip(self.addresses(), other.addresses(), strict=True)
        )
        return Span(
            pos, doc, role, None if self.sharding is None else self.sharding.join(other.sharding)
        )

    def cast(self, role: int) -> "Span":
        """The same tokens, all in this role; on every rank where they are cut."""
        return Span(
            self.pos,
            self.doc,
            torch.full_like(self.role, role),
            None if self.sharding is None else self.sharding.cast(role),
        )

    def addresses(self) -> tuple[Tensor, Tensor, Tensor]:
        """(pos, doc, role)."""
        return self.pos, self.doc, self.role

    def opens(self) -> Tensor:
        """[B, T] bool: True where a document begins."""
        return (self.pos == 0) & (self.doc != PADDING)

    def valid(self) -> Tensor:
        """[B, T] bool: False at padding."""
        return self.doc != PADDING

    @property
    def shape(self) -> torch.Size:
        return self.pos.shape
