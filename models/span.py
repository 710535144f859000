"""Addresses of tokens: position inside the document, number of the document, and role.

Letters: B rows, T tokens.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Roles of tokens. GIVEN marks tokens that are not predicted; only batches use it.
TEXT, PREFIX, GLOBAL, READ, WRITE, GIVEN = range(6)
PADDING = -1  # the document number of padding


@dataclass(frozen=True)
class Span:
    """The addresses of the tokens a module computes, however the sequence was sharded.

    Model code reads addresses from here and never derives them from a rank, so the same forward
    pass is right for a whole sequence, a shard, several pieces of a sequence, or one decoded token.

    Attributes:
        pos: [B, T] int64, index of the token in its own document; 0 opens one.
        doc: [B, T] int64, number of the document, different for each document of a row (in
            training: of a step); PADDING marks tokens that are invisible to all.
        role: [B, T] int64, TEXT, PREFIX, GLOBAL, READ or WRITE.
        sharding: how the row was sharded over ranks (a parallel.sharding.SequenceSharding); None if
            it was not. Opaque in models/.
        plans: results that models.kernels.block_plan computed for these queries, stored so that
            layers with equal masks share them.
        past: the state carried from earlier rows of these lanes (a
            models.carried_state.CarriedState); None if nothing is carried.
    """

    pos: Tensor
    doc: Tensor
    role: Tensor
    sharding: Any = None
    plans: dict = field(default_factory=dict, compare=False, repr=False)
    past: Any = field(default=None, compare=False, repr=False)

    @staticmethod
    def of(pos: Tensor, doc: Tensor, role: Tensor | None = None) -> "Span":
        """Creates a span; `role` defaults to TEXT everywhere."""
        if role is None:
            role = torch.full_like(pos, TEXT)
        return Span(pos, doc, role)

    @staticmethod
    def line(rows: int, tokens: int, device: Any = None) -> "Span":
        """Creates a span with one unbroken document per row."""
        pos = torch.arange(tokens, device=device).expand(rows, tokens)
        return Span.of(pos, torch.zeros_like(pos))

    def map(self, move: Any) -> "Span":
        """Applies `move` ([B, T] -> [B, T']) to pos, doc and role.

        The result has no sharding: `move` may select or reorder tokens, and the sharding describes
        the original ones.
        """
        return Span(move(self.pos), move(self.doc), move(self.role))

    def join(self, other: "Span") -> "Span":
        """Concatenates these addresses and others of the same rows, and their shardings too."""
        pos = torch.cat([self.pos, other.pos], 1)
        doc = torch.cat([self.doc, other.doc], 1)
        role = torch.cat([self.role, other.role], 1)
        sharding = None if self.sharding is None else self.sharding.join(other.sharding)
        return Span(pos, doc, role, sharding)

    def cast(self, role: int) -> "Span":
        """The same tokens, all with this role, on every rank that has a shard of them."""
        sharding = None if self.sharding is None else self.sharding.cast(role)
        return Span(self.pos, self.doc, torch.full_like(self.role, role), sharding)

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
        """(B, T)."""
        return self.pos.shape
