"""Recurrent cells whose part that depends on the token alone is computed for all tokens at once.

Letters: B rows, W width, G gates of a cell.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from models.init import Rule, orthogonal
from models.layer import Layer

CellKind = Literal["gru", "lstm"]
CellState = tuple[Tensor, ...]
"""Hidden [B, W], and of an LSTM the cell [B, W]."""


class Cell(Layer):
    """One step of a recurrence.

    Args:
        inputs: channels of a token.
        width: W.
        fed: channels of what each step reads beside the token, such as a context; 0 = nothing.
    """

    gates: int
    feed: nn.Module | None

    def __init__(self, inputs: int, width: int, fed: int = 0):
        super().__init__()
        self.width = width
        self.input = nn.Linear(inputs, self.gates * width)
        self.recurrent = nn.Linear(width, self.gates * width)
        feed = nn.Linear(fed, self.gates * width, bias=False) if fed else None
        self.register_module("feed", feed)

    def init_rules(self) -> dict[str, Rule]:
        """Starts at gains near 1: at 0.02 a recurrence forgets within a few steps."""
        rules: dict[str, Rule] = {"input.weight": scaled, "recurrent.weight": self._orthogonal}
        if self.feed is not None:
            rules["feed.weight"] = scaled
        return rules

    def _orthogonal(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Each gate's matrix by itself (Saxe et al. 2013, arXiv:1312.6120)."""
        square = torch.Size((shape[0] // self.gates, shape[1]))
        return torch.cat([orthogonal()(square, generator) for _ in range(self.gates)])

    def project(self, tokens: Tensor) -> Tensor:
        """[B, T, inputs] -> [B, T, G W]: the part of the gates that tokens alone decide."""
        return self.input(tokens)

    def blank(self, rows: int, like: Tensor) -> CellState:
        """Returns the state before a sequence."""
        raise NotImplementedError(f"{type(self).__name__} must define `blank`")

    def step(self, projected: Tensor, state: CellState, fed: Tensor | None = None) -> CellState:
        """Returns the state after a token.

        Args:
            projected: [B, G W], what `project` gave of the token.
            state: before it.
            fed: [B, fed] what is read beside it.
        """
        wide = state[0].dtype
        narrow = self.recurrent.weight.dtype
        entering = projected
        if self.feed is not None:
            assert fed is not None, "the cell was built to be fed"
            entering = entering + self.feed(fed.to(narrow))
        repeated = self.recurrent(state[0].to(narrow))
        return self._turn(entering.to(wide), repeated.to(wide), state)

    def _turn(self, entering: Tensor, repeated: Tensor, state: CellState) -> CellState:
        raise NotImplementedError(f"{type(self).__name__} must define `_turn`")


class GruCell(Cell):
    """Gated recurrent unit, with the reset gate behind the recurrent product, as in torch.nn.GRU.

    Source: Cho et al. 2014 (arXiv:1406.1078); there the reset gate is before the product.
    """

    gates = 3

    def blank(self, rows: int, like: Tensor) -> CellState:
        """See Cell.blank."""
        return (like.new_zeros(rows, self.width),)

    def _turn(self, entering: Tensor, repeated: Tensor, state: CellState) -> CellState:
        reset_in, update_in, new_in = entering.chunk(3, -1)
        reset_back, update_back, new_back = repeated.chunk(3, -1)
        reset = torch.sigmoid(reset_in + reset_back)
        update = torch.sigmoid(update_in + update_back)
        new = torch.tanh(new_in + reset * new_back)
        return (torch.lerp(new, state[0], update),)


class LstmCell(Cell):
    """Long short-term memory, as in torch.nn.LSTM.

    Source: Hochreiter & Schmidhuber 1997; forget gate Gers et al. 2000.
    """

    gates = 4

    def blank(self, rows: int, like: Tensor) -> CellState:
        """See Cell.blank."""
        zeros = like.new_zeros(rows, self.width)
        return zeros, zeros

    def init_rules(self) -> dict[str, Rule]:
        """Forget gates start open."""
        forget = torch.arange(4 * self.width) // self.width == 1
        return super().init_rules() | {"input.bias": lambda shape, generator: forget.float()}

    def _turn(self, entering: Tensor, repeated: Tensor, state: CellState) -> CellState:
        enter, keep, new, say = (entering + repeated).chunk(4, -1)
        cell = keep.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
        return say.sigmoid() * cell.tanh(), cell


CELLS: dict[str, type[Cell]] = {"gru": GruCell, "lstm": LstmCell}


def scaled(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Normal with a deviation of 1 / sqrt(inputs)."""
    return torch.randn(shape, generator=generator) * shape[-1] ** -0.5


def where_rows(chosen: Tensor, first: CellState, second: CellState) -> CellState:
    """Takes the rows of `first` where `chosen` [B] is true, else those of `second`."""
    picked = []
    for one, other in zip(first, second, strict=True):
        picked.append(torch.where(chosen[:, None], one, other))
    return tuple(picked)
