"""Named sums that a step adds up over its micro-batches, and then over all ranks at once."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class StepSums:
    """Sums tensors by name in float64; every rank adds the same names in the same sizes."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def add(self, found: Mapping[str, Tensor]) -> None:
        """Adds the values of a micro-batch, detached from their graph."""
        for name, value in found.items():
            value = value.detach().double()
            self.held[name] = self.held[name] + value if name in self.held else value

    def over(self, group: Any) -> dict[str, Tensor]:
        """Returns the sums over the ranks of `group` on the CPU, by one all-reduce.

        Args:
            group: the ranks; None for the sums of this rank alone.
        """
        names = sorted(self.held)
        flat = torch.cat([self.held[name].flatten() for name in names])
        if group is not None:
            dist.all_reduce(flat, group=group)
        parts = flat.cpu().split([self.held[name].numel() for name in names])
        return {name: part.view_as(self.held[name]) for name, part in zip(names, parts)}
