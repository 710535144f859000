"""Named sums that a step adds up over its micro-batches, and then over all ranks at once."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class StepFigures(NamedTuple):
    """Figures of a step on the CPU, the same on every rank.

    Attributes:
        totals: sums over ranks, by name.
        norm: of the gradient, as this rank has it.
        largest: [2] float64, loss and norm, the largest of any rank; inf where one is not finite.
    """

    totals: dict[str, Tensor]
    norm: float
    largest: Tensor


class UnreadFigures:
    """Figures of a step on their way from the device.

    Args:
        named: splits the sums by name.
        sent: [n + 3] the sums, the norm of this rank, and the largest loss and norm of any.

    Attributes:
        unusable: [] float32 on the device, 1 where the loss or the norm is not finite, else 0.
        known_at: when they were computed, by time.perf_counter; of a GPU when they were read.
    """

    def __init__(self, named: Callable[[Tensor], dict[str, Tensor]], sent: Tensor):
        self.named = named
        self.unusable = 1 - sent[-2:].isfinite().all().float()
        self.arrived = None
        self.sent = sent
        self.known_at = time.perf_counter()
        if sent.is_cuda:
            # The copy begins where the device gets to it, and the host looks when it needs it.
            self.sent = torch.empty(sent.shape, dtype=sent.dtype, pin_memory=True)
            self.sent.copy_(sent, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> StepFigures:
        """Waits until the device has computed them."""
        if self.arrived is not None:
            self.arrived.synchronize()
            self.known_at = time.perf_counter()
        read = self.sent.cpu()
        return StepFigures(self.named(read[:-3]), read[-3].item(), read[-2:])


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
        return self._named(self._sums(group).cpu())

    def read(self, group: Any, norm: Tensor) -> StepFigures:
        """Returns the sums over the ranks of `group`, with the norm of the gradient.

        It waits for the device once: for the sums, the norm, and their maxima over ranks.

        Args:
            group: as for `over`.
            norm: [] float64.
        """
        return self.send(group, norm).read()

    def send(self, group: Any, norm: Tensor) -> "UnreadFigures":
        """As `read`, but the figures stay on the device, which nobody waits for."""
        sums = self._sums(group)
        loss = self._named(sums)["loss"]
        largest = torch.stack([loss, norm])
        largest = torch.where(largest.isfinite(), largest, torch.inf)
        if group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        return UnreadFigures(self._named, torch.cat([sums, norm[None], largest]))

    def _sums(self, group: Any) -> Tensor:
        """Returns the sums over ranks, end to end in the order of their names."""
        flat = torch.cat([self.held[name].flatten() for name in sorted(self.held)])
        if group is not None:
            dist.all_reduce(flat, group=group)
        return flat

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        names = sorted(self.held)
        parts = flat.split([self.held[name].numel() for name in names])
        return {name: part.view_as(self.held[name]) for name, part in zip(names, parts)}
