"""Collective communication of the drivers, within one group of ranks.

Every byte that is sent is counted. Public torch.distributed collectives only. Where a group's
backend cannot carry the tensors of a device (gloo and those of a GPU), they go through the host's
memory: slow, and it lets several ranks share one GPU, which NCCL refuses.
Letters: B rows, c local tokens, P ranks, H heads.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

HeadRange = tuple[int, int]  # first head and the one after the last


class Communicator:
    """The ranks of a group, seen from one of them.

    Attributes: rank, size: this rank's number in the group, and how many there are. sent: bytes
        handed to other ranks so far, by name of the move; shared with the wires of its grids.
        heads: ranks that trade heads in the grid that was asked for, or None. choices: which method
        serves which attention and why, where parallel.method=auto had to choose. timeout: the
        longest wait in a collective of the groups that `grid` makes; None = torch's own.
        host_only: whether the group carries tensors in the host's memory alone.
    """

    def __init__(self, group: Any):
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.bytes_sent: dict[str, int] = {}
        self.heads: int | None = None
        self.timeout: timedelta | None = None
        self.choices: dict[str, str] = {}
        self.host_only = dist.get_backend(group) == "gloo"
        self.grids: dict[int, tuple[Communicator, Communicator]] = {}

    def add_grid(self, ulysses_group: Any, ring_group: Any) -> "Grid":
        """Registers a grid of this group: rank = ring rank x ulysses size + ulysses rank."""
        grid = Communicator(ulysses_group), Communicator(ring_group)
        for side in grid:
            side.bytes_sent = self.bytes_sent
        assert (grid[1].rank, grid[0].rank) == divmod(self.rank, grid[0].size), (
            "heads are the inner side of the grid"
        )
        return self.grids.setdefault(grid[0].size, grid)

    def grid(self, heads: int) -> "Grid":
        """Returns the communicators (ulysses, ring) of a grid, created at the first request.

        Collective: all ranks request the same grids in the same order.
        """
        if heads not in self.grids:
            first = self.rank // heads * heads
            inner = self.rank % heads
            sides = range(first, first + heads), range(inner, self.size, heads)
            names = [[dist.get_global_rank(self.group, r) for r in side] for side in sides]
            self.add_grid(
                *(
                    dist.new_group(side, timeout=self.timeout, use_local_synchronization=True)
                    for side in names
                )
            )
        return self.grids[heads]

    def count_bytes(self, move: str, size: int) -> None:
        """Adds `size` bytes to those sent."""
        self.bytes_sent[move] = self.bytes_sent.get(move, 0) + size

    def ring_shift(self, tensors: Sequence[Tensor], name: str = "rotate") -> "Pending":
        """Starts sending tensors to the next rank and receiving from the one before.

        The received tensors have the same shapes. From the host's memory, where each message costs,
        tensors of one dtype travel as one.
        """
        to, source = (
            dist.get_global_rank(self.group, (self.rank + s) % self.size) for s in (1, -1)
        )
        on_host = self.host_only or tensors[0].device.type == "cpu"
        if on_host and len({t.dtype for t in tensors}) == 1:
            out, into, received = _packed(tensors)
        else:
            out = [self._carried(t) for t in tensors]
            into = received = [torch.empty_like(t) for t in out]
        sends = [dist.P2POp(dist.isend, t, to, self.group) for t in out if t.numel()]
        takes = [dist.P2POp(dist.irecv, t, source, self.group) for t in into if t.numel()]
        self.count_bytes(name, sum(t.numel() * t.element_size() for t in out))
        # Receives first: gloo holds up one that is posted while it is busy sending.
        works = dist.batch_isend_irecv([*takes, *sends]) if sends else []
        return Pending(works, received, out, [t.device for t in tensors])

    def all_reduce(self, x: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
        """Returns x reduced over the ranks, in its own memory; the caller counts the bytes."""
        carried = self._carried(x).clone()
        dist.all_reduce(carried, op=operation, group=self.group)
        return carried.to(x.device)

    def _carried(self, x: Tensor) -> Tensor:
        """Returns x contiguous, in memory that the group's backend can send from."""
        return (x.cpu() if self.host_only else x).contiguous()

    def all_to_all(
        self, parts: Sequence[Tensor], sizes: Sequence[int], name: str = "exchange"
    ) -> list[Tensor]:
        """Sends parts[r] to rank r and returns what each rank sent.

        Returns:
            Flat tensors in rank order, the r-th of sizes[r] numbers.
        """
        return self.start_all_to_all(parts, sizes, name).wait()

    def start_all_to_all(
        self, parts: Sequence[Tensor], sizes: Sequence[int], name: str = "exchange"
    ) -> "Pending":
        """As `all_to_all`, whose result comes out of the wait: meanwhile something is computed."""
        sending = self._carried(torch.cat([p.reshape(-1) for p in parts]))
        taken = sending.new_empty(sum(sizes))
        counts = [p.numel() for p in parts]
        work = dist.all_to_all_single(
            taken, sending, list(sizes), counts, group=self.group, async_op=True
        )
        self.count_bytes(name, (sending.numel() - counts[self.rank]) * sending.element_size())
        devices = [parts[0].device] * self.size
        return Pending([work], list(taken.split(list(sizes))), [sending], devices)

    def send(self, tensors: Sequence[Tensor], to: int, name: str) -> "Pending":
        """Starts sending tensors to one rank, which receives them in the same order.

        The result must be waited for before the process exits.
        """
        out = [self._carried(t) for t in tensors]
        whom = dist.get_global_rank(self.group, to)
        self.count_bytes(name, sum(t.numel() * t.element_size() for t in out))
        return Pending([dist.isend(t, whom, self.group) for t in out if t.numel()], [], out, [])

    def recv(self, likes: Sequence[Tensor], source: int) -> list[Tensor]:
        """Receives tensors of these shapes and dtypes from one rank; blocks until they arrive."""
        device = "cpu" if self.host_only else None
        into = [
            torch.empty_like(t, device=device, memory_format=torch.contiguous_format) for t in likes
        ]
        whom = dist.get_global_rank(self.group, source)
        works = [dist.irecv(t, whom, self.group) for t in into if t.numel()]
        return Pending(works, into, [], [t.device for t in likes]).wait()


def _packed(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Joins tensors of one dtype into one message in the host's memory.

    Returns:
        ([what is sent], [what is received into], its parts in the shapes of the tensors).
    """
    sizes = [t.numel() for t in tensors]
    sent = torch.empty(sum(sizes), dtype=tensors[0].dtype)
    for part, tensor in zip(sent.split(sizes), tensors):
        part.view(tensor.shape).copy_(tensor)
    taken = torch.empty_like(sent)
    received = [part.view(t.shape) for part, t in zip(taken.split(sizes), tensors)]
    return [sent], [taken], received


Grid = tuple[Communicator, Communicator]  # the ranks that trade heads, and those of the ring


class Pending:
    """Communication in flight; `wait` returns the received tensors, each on its device.

    The sent tensors are kept alive until then.
    """

    def __init__(
        self,
        works: Sequence[Any],
        into: list[Tensor],
        kept: list[Tensor],
        devices: Sequence[torch.device],
    ):
        self.works = works
        self.into = into
        self.kept = kept
        self.devices = devices

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return [x.to(device) for x, device in zip(self.into, self.devices)]


def _seq_to_heads(
    x: Tensor,
    communicator: Communicator,
    dim: int | None,
    shares: Sequence[HeadRange],
    *,
    move: str,
) -> Tensor:
    """[B, c, .., H, ..] -> [B, P c, .., own share, ..]: to each rank its heads, from each rank its
    tokens."""
    parts = [x if dim is None else x.narrow(dim, a, b - a) for a, b in shares]
    shape = list(x.shape)
    if dim is not None:
        shape[dim] = shares[communicator.rank][1] - shares[communicator.rank][0]
    size = torch.Size(shape).numel()
    return torch.cat(
        [p.view(shape) for p in communicator.all_to_all(parts, [size] * communicator.size, move)], 1
    )


def _heads_to_seq(
    x: Tensor,
    communicator: Communicator,
    dim: int | None,
    shares: Sequence[HeadRange],
    whole: torch.Size,
    *,
    move: str,
) -> Tensor:
    """Adjoint of `_seq_to_heads`; where head ranges overlap, gradients are summed in float32."""
    shapes = []
    for a, b in shares:
        shape = list(whole)
        if dim is not None:
            shape[dim] = b - a
        shapes.append(torch.Size(shape))
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(whole, dtype=wide)
    parts = communicator.all_to_all(
        x.chunk(communicator.size, 1), [s.numel() for s in shapes], move
    )
    for (a, b), shape, part in zip(shares, shapes, parts):
        (total if dim is None else total.narrow(dim, a, b - a)).add_(part.view(shape))
    return total.to(x.dtype)


class _SeqToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        communicator: Communicator,
        dim: int | None,
        shares: Sequence[HeadRange],
    ) -> Tensor:
        ctx.args = communicator, dim, shares, x.shape
        return _seq_to_heads(x, communicator, dim, shares, move="deal")

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return _heads_to_seq(grad, *ctx.args, move="deal backward"), None, None, None


class _HeadsToSeq(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, communicator: Communicator, dim: int, shares: Sequence[HeadRange]
    ) -> Tensor:
        ctx.args = communicator, dim, shares
        shape = list(x.shape)
        shape[1] = x.shape[1] // communicator.size
        shape[dim] = shares[-1][1]
        return _heads_to_seq(x, communicator, dim, shares, torch.Size(shape), move="collect")

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return _seq_to_heads(grad, *ctx.args, move="collect backward"), None, None, None


def seq_to_heads(
    x: Tensor, communicator: Communicator, dim: int | None, shares: Sequence[HeadRange]
) -> Tensor:
    """Trades heads for tokens: [B, c, .., H, ..] -> [B, P c, .., h, ..], ranks' tokens end to end.

    Args:
        dim: which dim of x counts heads; None where x has none, and every rank gets all of it.
        shares: for each rank its heads; shares may overlap, and gradients are then summed.
    """
    return _SeqToHeads.apply(x, communicator, dim, shares)


def heads_to_seq(
    x: Tensor, communicator: Communicator, dim: int, shares: Sequence[HeadRange]
) -> Tensor:
    """Trades tokens for heads: [B, P c, .., h, ..] -> [B, c, .., H, ..].

    The shares must not overlap.
    """
    return _HeadsToSeq.apply(x, communicator, dim, shares)


def all_to_all_rows(
    x: Tensor, communicator: Communicator, given: Sequence[int], taken: Sequence[int], name: str
) -> Tensor:
    """[sum(given), ...] -> [sum(taken), ...]: the first given[0] entries to rank 0, and so on;
    taken[r] come from rank r.

    Args:
        given, taken: numbers of entries; what this rank gives to r is what r takes from it.
        name: under which the bytes are counted, those of backward with " backward" after it.
    """
    return _AllToAllRows.apply(x, communicator, tuple(given), tuple(taken), name)


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        communicator: Communicator,
        given: tuple[int, ...],
        taken: tuple[int, ...],
        name: str,
    ) -> Tensor:
        ctx.args = communicator, given, taken, name
        return _all_to_all_rows(x, communicator, given, taken, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        communicator, given, taken, name = ctx.args
        return (
            _all_to_all_rows(grad, communicator, taken, given, f"{name} backward"),
            None,
            None,
            None,
            None,
        )


def _all_to_all_rows(
    x: Tensor, communicator: Communicator, given: tuple[int, ...], taken: tuple[int, ...], name: str
) -> Tensor:
    each = x.shape[1:].numel()
    parts = communicator.all_to_all(
        x.contiguous().split(list(given)), [n * each for n in taken], name
    )
    return torch.cat(parts).view(sum(taken), *x.shape[1:])
