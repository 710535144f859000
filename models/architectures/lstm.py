"""An LSTM as a whole model: what a Neural Turing Machine is without its memory."""

import torch
from torch import Tensor, nn

from models.architectures.token_by_token import LstmGates, StateTuple, TokenByTokenModel, scaled
from models.memory.base import Memory


class Lstm(TokenByTokenModel):
    """Layers of LSTM cells over the bits of tokens; see Stepped for what comes in and goes out.

    Args:
        vocabulary: token numbers are below it.
        width: of every layer.
        layers: of them.
        memory: as in Stepped.

    Source: Hochreiter & Schmidhuber 1997, as the baseline of Graves et al. 2014 (arXiv:1410.5401).
    """

    def __init__(self, vocabulary: int, width: int, layers: int, memory: Memory | None = None):
        super().__init__(vocabulary, memory)
        self.width = width
        self.cells = nn.ModuleList(
            LstmGates(width if layer else self.bits, width) for layer in range(layers)
        )
        self.out = nn.Linear(width, self.bits)

    def init_rules(self) -> dict:
        return {"out.weight": scaled}

    def blank(self, rows: int, like: Tensor) -> StateTuple:
        """For each layer what it said and its cell, all [B, width]."""
        return tuple(like.new_zeros(rows, self.width) for _ in range(2 * len(self.cells)))

    def token(self, x: Tensor, state: StateTuple) -> tuple[Tensor, StateTuple]:
        after: list[Tensor] = []
        for cell, hidden, held in zip(self.cells, state[0::2], state[1::2]):
            after += cell(x, hidden, held)
            x = after[-2]
        return self.out(x.to(self.out.weight.dtype)).to(
            torch.promote_types(state[0].dtype, x.dtype)
        ), tuple(after)
