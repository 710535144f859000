"""The recurrent encoder: layers of cells over a source, in one direction or in both.

Letters: B rows, S tokens of the source, W width of a direction.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.layer import Layer
from models.primitives.row_replica import RowReplica
from models.primitives.sequential import SequentialScan, StepFunction, segments_by_row
from models.seq2seq.cells import CELLS, Cell, CellKind, where_rows
from models.span import Span

ROWS = 4  # rows that a rank steps through at a time: a step is many small operations


def segments_from_the_end(span: Span, size: int | None, parts: int) -> Tensor:
    """Cuts rows as `segments_by_row` does, each read from its last token to its first."""
    index = segments_by_row(span, size, parts)
    return torch.where(index >= 0, span.shape[1] - 1 - index, -1)


class Direction(Layer):
    """One layer of cells in one direction; the state is blank where a document begins.

    Args:
        inputs: channels of a token.
        width: W.
        cell: gru or lstm.
        backward: reads documents from their end.
    """

    def __init__(self, inputs: int, width: int, cell: CellKind, *, backward: bool):
        super().__init__()
        self.cell: Cell = CELLS[cell](inputs, width)
        self.scan = SequentialScan(
            segments_from_the_end if backward else segments_by_row, rows=ROWS
        )

    def sequential_parts(self, parent: nn.Module) -> Iterable[nn.Module]:
        """See Layer."""
        return (self.cell,)

    def forward(self, hidden: Tensor, span: Span, begins: Tensor) -> Tensor:
        """[B, S, inputs] -> [B, S, W], in the type that states are summed in.

        Args:
            begins: [B, S] of the state's type, 1 at the tokens before which the state is blank.
        """
        projected = self.cell.project(hidden)
        state = self.cell.blank(len(hidden), begins)
        output, _ = self.scan(self._step(), (projected, begins), state, span=span)
        return output

    def _step(self) -> StepFunction:
        cell = self.cell

        def step(
            xs: tuple[Tensor, ...], span: Span, state: tuple[Tensor, ...]
        ) -> tuple[Tensor, tuple[Tensor, ...]]:
            projected, begins = xs
            blank = cell.blank(len(projected), begins)
            valid = span.valid()
            outputs = []
            for token in range(projected.shape[1]):
                before = where_rows(begins[:, token] > 0, blank, state)
                after = cell.step(projected[:, token], before)
                state = where_rows(valid[:, token], after, state)
                outputs.append(state[0])
            return torch.stack(outputs, 1), state

        return step


class RecurrentEncoder(Layer):
    """Layers of cells over the source.

    Args:
        width: channels of its tokens and of its output; half of the output for each direction.
        layers: of cells.
        cell: gru or lstm.
        bidirectional: reads documents from both ends.
    """

    def __init__(self, width: int, layers: int, cell: CellKind, *, bidirectional: bool):
        super().__init__()
        if bidirectional and width % 2:
            raise ValueError(
                f"model.width={width} is not even, and each of two directions has half of it; use"
                f" model.width={width + 1}, or model.bidirectional=false"
            )
        self.width = width // 2 if bidirectional else width
        self.bidirectional = bidirectional
        self.replica = RowReplica()
        self.forwards = nn.ModuleList(
            Direction(width, self.width, cell, backward=False) for _ in range(layers)
        )
        count = layers if bidirectional else 0
        self.backwards = nn.ModuleList(
            Direction(width, self.width, cell, backward=True) for _ in range(count)
        )

    def forward(self, hidden: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Returns the states of the top layer, and what a document leaves at its ends.

        Args:
            hidden: [B, S, width].
            span: addresses of the source.

        Returns:
            ([B, S, width], [B, S, width]): the second holds the forward state at the last token of
            each document and the backward state at its first, and 0 elsewhere, so that its sum over
            a document is what each direction knows of all of it.
        """
        wide = torch.promote_types(hidden.dtype, torch.float32)
        opens = span.opens().to(wide)
        closes = self.replica.own(_closes(self.replica.addresses(span)), span).to(wide)
        states = hidden
        for number, layer in enumerate(self.forwards):
            parts = [layer(states.to(hidden.dtype), span, opens)]
            if self.bidirectional:
                parts.append(self.backwards[number](states.to(hidden.dtype), span, closes))
            states = torch.cat(parts, -1)
        ends = states[..., : self.width] * closes[..., None]
        if self.bidirectional:
            ends = torch.cat([ends, states[..., self.width :] * opens[..., None]], -1)
        return states, ends


def _closes(span: Span) -> Tensor:
    """[B, S] bool: True at the last token of each document of whole rows."""
    doc = span.doc
    after = torch.cat([doc[:, 1:], torch.full_like(doc[:, :1], -1)], 1)
    return (doc != after) & span.valid()
