"""Rows cut in time, `parallel.time=N`: the pieces of a row are computed one after another.

The memory of a step is that of one piece and of what pieces leave to each other; gradients are
exact (models/pieces/piece_state.py). Forward runs twice, as under full activation checkpointing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.pieces.piece_state import PieceState
from models.span import Span
from parallel.heap import trim_heap


def run_in_pieces(
    state: PieceState,
    look_ahead: Callable[[int, Span], object],
    learn: Callable[[int, Span], Tensor],
    backward: Callable[[Tensor, bool], None],
) -> None:
    """Computes the gradients of rows, piece by piece.

    Args:
        state: of these rows.
        look_ahead: computes a piece without a gradient, given its number and addresses; what it
            returns is not used.
        learn: computes a piece with its gradient and returns its loss [].
        backward: accumulates the gradient of a loss; is told whether it is the last.
    """
    # What pieces leave to each other is small and lies among what they are computed in: on a CPU
    # the heap would otherwise grow by some of its holes with every piece.
    device = state.pieces[0].pos.device
    for number in range(len(state.pieces)):
        if number == state.last and not state.needs_last:
            break
        with torch.no_grad():
            look_ahead(number, state.enter(number))
        trim_heap(device)
    state.end_first_pass()
    for number in reversed(range(len(state.pieces))):
        loss = learn(number, state.enter(number, learning=True))
        backward(state.handed(loss), number == 0)
        state.collect()
        trim_heap(device)
