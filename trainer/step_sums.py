"""Named sums that a step adds up over its micro-batches, and then over all ranks at once."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class StepSums:
    """Float64 sums by name; every rank adds the same names, in tensors of the same sizes."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def add(self, found: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's; what has a gradient is added without it."""
        for name, value in found.items():
            value = value.detach().double()
            self.held[name] = self.held[name] + value if name in self.held else value

    def over(self, group: Any) -> dict[str, Tensor]:
        """The sums over the ranks of `group` (None: this rank's own), by one all-reduce; on the
        CPU."""
        names = sorted(self.held)
        flat = torch.cat([self.held[name].flatten() for name in names])
        if group is not None:
            dist.all_reduce(flat, group=group)
        parts = flat.cpu().split([self.held[name].numel() for name in names])
        return {name: part.view_as(self.held[name]) for name, part in zip(names, parts)}
