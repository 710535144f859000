"""Puts a row that decodes aside, and takes it back later, whatever its caches are.

A row may also be computed again from its tokens, which needs no memory at all.
"""

import torch
from torch import Tensor

from models.cache.decoding_state import DecodingState


@torch.no_grad()
def swap_out(state: DecodingState, row: int) -> dict[str, Tensor]:
    """Returns copies of everything that a row holds, in host memory.

    The row stays in the state until `DecodingState.select` drops it.
    """
    exported = state.export_state()
    return {name: tensor[row : row + 1].cpu().clone() for name, tensor in exported.items()}


@torch.no_grad()
def swap_in(state: DecodingState, swapped: dict[str, Tensor], device: torch.device) -> None:
    """Adds a row that was swapped out below the others."""
    returned = DecodingState(state.factory)
    returned.import_state({name: tensor.to(device) for name, tensor in swapped.items()})
    returned.restore(state)
    state.join(returned)
