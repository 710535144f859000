"""An exchange of rows between whose start and whose wait something else is computed.

    flight = RowsInFlight(x, communicator, given, taken, "name")
    y = compute(...)
    received = flight.wait()

Start and wait are a step of autograd each, and backward goes through the steps in reverse: the
wait's starts the exchange of the gradients, then the gradients of `compute` are computed, then the
start's waits.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.collectives import Communicator, Pending


class RowsInFlight:
    """Rows on their way: `parallel.collectives.all_to_all_rows` in two steps.

    Args:
        x, communicator, given, taken, name: as `all_to_all_rows` takes them.
    """

    def __init__(
        self,
        x: Tensor,
        communicator: Communicator,
        given: Sequence[int],
        taken: Sequence[int],
        name: str,
    ):
        self.exchange = _Exchange(communicator, tuple(given), tuple(taken), name)
        # Autograd's link between the two steps; the rows themselves are not there yet.
        self.ticket = _Start.apply(x, self.exchange)

    def wait(self) -> Tensor:
        """Returns [sum(taken), ...]: taken[r] rows of rank r."""
        return _Wait.apply(self.ticket, self.exchange)


class _Exchange:
    """Rows in flight between a start and its wait, forward or backward."""

    def __init__(
        self, communicator: Communicator, given: tuple[int, ...], taken: tuple[int, ...], name: str
    ):
        self.communicator = communicator
        self.given = given
        self.taken = taken
        self.name = name
        self.arriving: list[tuple[Pending, torch.Size]] = []

    def start(self, x: Tensor) -> None:
        self._start(x, self.given, self.taken, self.name)

    def start_backward(self, gradient: Tensor) -> None:
        self._start(gradient, self.taken, self.given, f"{self.name} backward")

    def _start(self, x: Tensor, given: tuple[int, ...], taken: tuple[int, ...], name: str) -> None:
        each = x.shape[1:]
        parts = x.contiguous().split(list(given))
        sizes = [rows * each.numel() for rows in taken]
        pending = self.communicator.start_all_to_all(parts, sizes, name)
        self.arriving.append((pending, torch.Size((sum(taken), *each))))

    def finish(self) -> Tensor:
        pending, shape = self.arriving.pop()
        return torch.cat(pending.wait()).view(shape)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.start(x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return ctx.exchange.finish(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.finish()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        ctx.exchange.start_backward(grads[0])
        return grads[0].new_zeros(()), None
