"""Drivers of a recurrence over a shared row that reads a shared memory.

Each rank has a part of the memory and takes every step of the recurrence. A step costs two small
all-reduces, of a maximum and of the partial sums; its keys and values never move.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.primitives.memory_read import MemoryRead
from models.primitives.row_replica import RowReplica
from models.span import Span
from parallel.collectives import Communicator, seq_to_heads


class SharedMemoryRead(MemoryRead):
    """Replaces a MemoryRead whose memory is shared over the ranks of `communicator`."""

    def __init__(self, leaf: MemoryRead, communicator: Communicator):
        super().__init__()
        self.place = leaf.place
        self.communicator = communicator

    def largest(self, x: Tensor) -> Tensor:
        """See MemoryRead.largest; no gradient flows through it."""
        x = self.communicator.all_reduce(x, dist.ReduceOp.MAX)
        self.communicator.count_bytes("memory read", x.numel() * x.element_size())
        return x

    def total(self, x: Tensor) -> Tensor:
        """See MemoryRead.total."""
        return _Total.apply(x, self.communicator)


class SharedRowReplica(nn.Module):
    """Replaces a RowReplica whose rows are shared over the ranks of `communicator`.

    While rows are decoded every rank has their tokens, and nothing is to be brought together.
    """

    def __init__(self, leaf: RowReplica, communicator: Communicator):
        super().__init__()
        self.place = leaf.place
        self.communicator = communicator

    def addresses(self, span: Span) -> Span:
        """See RowReplica.addresses; every rank has those of all ranks."""
        return span if span.sharding is None else span.sharding.whole

    def gather(self, x: Tensor, span: Span) -> Tensor:
        """See RowReplica.gather."""
        if span.sharding is None:
            return x
        # Ranges of no heads: every rank receives all tokens.
        everything = [(0, 0)] * self.communicator.size
        in_rank_order = seq_to_heads(x, self.communicator, None, everything)
        return span.sharding.to_global_order(in_rank_order)

    def own(self, x: Tensor, span: Span) -> Tensor:
        """See RowReplica.own."""
        if span.sharding is None:
            return x
        first = self.communicator.rank * span.shape[1]
        return span.sharding.to_rank_order(x)[:, first : first + span.shape[1]]

    def total(self, x: Tensor) -> Tensor:
        """See RowReplica.total."""
        return _Total.apply(x, self.communicator)


class _Total(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, communicator: Communicator) -> Tensor:
        ctx.communicator = communicator
        return _summed(x, communicator, "memory read")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.communicator, "memory read backward"), None


def _summed(x: Tensor, communicator: Communicator, move: str) -> Tensor:
    x = communicator.all_reduce(x)
    communicator.count_bytes(move, x.numel() * x.element_size())
    return x
