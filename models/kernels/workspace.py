"""Memory that blocks computed one after the other use again.

Where many blocks of a few MiB follow one another on a CPU, fresh memory for each costs LSH
attention a twelfth of its time (LOG.md).
"""

import math

import torch
from torch import Tensor


class Workspace:
    """Tensors by name; each lies where the last of that name lay, which is overwritten.

    Args:
        device: where they lie.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.memory: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns a contiguous tensor of any content; that of this name before is given up."""
        size = math.prod(shape)
        memory = self.memory.get(name)
        if memory is None or memory.dtype != dtype or memory.numel() < size:
            memory = torch.empty(size, dtype=dtype, device=self.device)
            self.memory[name] = memory
        return memory[:size].view(shape)

    def gather(self, name: str, rows: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Gathers rows [R, D] at [...] -> [..., D] of this dtype."""
        shape = (index.numel(), rows.shape[-1])
        if rows.dtype == dtype:
            gathered = self.take(name, shape, dtype)
            torch.index_select(rows, 0, index.flatten(), out=gathered)
        else:
            gathered = rows.index_select(0, index.flatten()).to(dtype)
        return gathered.view(*index.shape, rows.shape[-1])

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Multiplies matrices: [N, r, n] and [N, n, c] -> [N, r, c]."""
        shape = (a.shape[0], a.shape[1], b.shape[2])
        return torch.bmm(a, b, out=self.take(name, shape, a.dtype))
