"""HandOn: rank r computes the r-th stretch of pieces of every row and hands the state on to rank r
+ 1: a wavefront over rows.

At tick r + b rank r works on group b of the rows, so all ranks are busy but for the ticks in which
the wave comes in and runs out, a share (P - 1) / (m + P - 1) of them with m groups. A rank keeps
the activations of its own stretch only; the work on one row does not become faster, only many rows
do. Tokens are brought to their stretch before the first tick and home after the last; in between
nothing but states moves, from one rank to the next, in backward from the next to this one.

The order in backward is made by a token, a number that passes through every move: the gradient of a
state is awaited, the group is gone back through, the gradient of the state that came in is handed
back, and only then comes the group before. A rank waits for its right neighbour alone, and the last
one for nobody, so nothing can lock.

Source: Huang et al. 2019, GPipe (arXiv:1811.06965), for the schedule; there the stages are layers,
here stretches of the row.

Letters: B rows, m groups of them, P ranks, N pieces, S slots of a piece, L slots of a stretch, c
local tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.primitives.sequential import Segments, SequentialScan, StepFunction, run_segments
from models.scores import Tensors
from models.span import Span
from parallel.collectives import Communicator, Pending, all_to_all_rows
from parallel.sharding import SequenceSharding


def bubble(ranks: int, groups: int) -> float:
    """Share of the ticks in which a rank has nothing to do."""
    return (ranks - 1) / (groups + ranks - 1)


class WavefrontPlan(NamedTuple):
    """What one rank computes, and how tokens get there and back.

    Attributes: pieces: those of this rank. first: number of the first of them. held: [sum(given)]
        int64, local tokens (row * c + token) as they go out, those for rank 0 first. slots:
        [sum(taken)] int64, where (row * L + slot) what comes in belongs. given, taken: how many to
        and from each rank.
    """

    pieces: Segments
    first: int
    held: Tensor
    slots: Tensor
    given: list[int]
    taken: list[int]


class Wavefront(nn.Module):
    """Stands in for a Relay whose tokens lie over the ranks of `wire`.

    Args:
        name: of the relay, for the log: how large the bubble is stands in `wire.choices`.
    """

    def __init__(self, core: SequentialScan, communicator: Communicator, name: str = "relay"):
        super().__init__()
        self.core = core
        self.communicator = communicator
        self.name = name
        self.groups = 0  # at the last call

    def forward(
        self,
        step: StepFunction,
        xs: Tensors,
        state: Tensors,
        *,
        span: Span,
        size: int | None = None,
        depth: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As Relay.forward; `state` comes in, and the last one goes out, whole on every rank.
        at.cut says who holds what."""
        key = ("hand on", self.core.cutter, size)
        if key not in span.plans:
            span.plans[key] = _wavefront_plan(
                span.sharding,
                self.core.pieces(span.sharding.whole, size, self.communicator.size),
                xs[0].device,
            )
        plan: WavefrontPlan = span.plans[key]
        here = [_there(x, plan, self.communicator) for x in xs]
        rows, every, chain = (
            span.shape[0],
            min(self.core.rows, span.shape[0]),
            _RankChain(self.communicator),
        )
        token = torch.zeros((), device=xs[0].device, requires_grad=torch.is_grad_enabled())
        parts = []
        ends = []
        for start in range(0, rows, every):
            some = slice(start, start + every)
            token, *came = _Recv.apply(chain, start == 0, token, *(s[some] for s in state))
            pieces = _rows(plan.pieces, some)
            y, after = run_segments(
                step,
                tuple(x[some] for x in here),
                tuple(came),
                pieces,
                depth=depth,
                first=plan.first,
            )
            token = _Send.apply(chain, token, *after)
            parts.append(y)
            ends.append(after)
        self._note(len(parts))
        token, *last = _Broadcast.apply(chain, token, *(torch.cat(some) for some in zip(*ends)))
        y, *last = _Join.apply(token, torch.cat(parts), *last)
        return _home(y, plan, self.communicator, span.sharding.layouts[0].each), tuple(last)

    def _note(self, groups: int) -> None:
        """Say how large the bubble is, when it has changed."""
        if groups != self.groups:
            ranks = self.communicator.size
            share = f"{bubble(self.communicator.size, groups):.0%}"
            self.communicator.choices[self.name] = (
                f"wavefront over {ranks} ranks, {groups} groups of rows: bubble {share}"
            )
        self.groups = groups


class _RankChain:
    """The moves of one forward pass and its backward: keeps alive what is under way."""

    def __init__(self, communicator: Communicator):
        self.communicator = communicator
        self.under_way: list[Pending] = []

    @property
    def first(self) -> bool:
        return self.communicator.rank == 0

    @property
    def last(self) -> bool:
        return self.communicator.rank == self.communicator.size - 1

    def send(self, tensors: Tensors, step: int, name: str) -> None:
        self.under_way.append(self.communicator.send(tensors, self.communicator.rank + step, name))

    def settle(self) -> None:
        """Wait until all that was handed on has left."""
        for arrival in self.under_way:
            arrival.wait()
        self.under_way.clear()


class _Recv(torch.autograd.Function):
    """(token, state before the row) -> (token, state that comes into the stretch)."""

    @staticmethod
    def forward(ctx: Any, chain: _RankChain, opens: bool, token: Tensor, *state: Tensor):
        ctx.args = chain, opens
        came = (
            [s.clone() for s in state]
            if chain.first
            else chain.communicator.recv(state, chain.communicator.rank - 1)
        )
        return token.clone(), *came

    @staticmethod
    def backward(ctx: Any, d_token: Tensor, *grads: Tensor):
        chain, opens = ctx.args
        if not chain.first:
            chain.send(grads, -1, "state backward")
            grads = tuple(
                torch.zeros_like(g) for g in grads
            )  # not None: every rank has the same graph
        if opens:
            chain.settle()
        return None, None, d_token, *grads


class _Send(torch.autograd.Function):
    """(token, state after the stretch) -> token; the state goes to the next rank."""

    @staticmethod
    def forward(ctx: Any, chain: _RankChain, token: Tensor, *state: Tensor):
        ctx.chain = chain
        ctx.likes = [(s.shape, s.dtype) for s in state]
        if not chain.last:
            chain.send(state, 1, "state")
        return token.clone()

    @staticmethod
    def backward(ctx: Any, d_token: Tensor):
        chain = ctx.chain
        grads = [
            torch.zeros(shape, dtype=dtype, device=d_token.device) for shape, dtype in ctx.likes
        ]
        if not chain.last:
            grads = chain.communicator.recv(grads, chain.communicator.rank + 1)
        return None, d_token, *grads


class _Broadcast(torch.autograd.Function):
    """(token, state after each rank's stretch) -> (token, the last rank's), on every rank."""

    @staticmethod
    def forward(ctx: Any, chain: _RankChain, token: Tensor, *state: Tensor):
        ctx.chain = chain
        ctx.set_materialize_grads(False)
        chain.settle()
        communicator = chain.communicator
        last = []
        for s in state:
            parts = [s if chain.last else s.new_empty(0)] * communicator.size
            sizes = [0] * (communicator.size - 1) + [s.numel()]
            last.append(communicator.all_to_all(parts, sizes, "last state")[-1].view(s.shape))
        return token.clone(), *last

    @staticmethod
    def backward(ctx: Any, d_token: Tensor | None, *grads: Tensor | None):
        chain, communicator = ctx.chain, ctx.chain.communicator
        back: list[Tensor | None] = []
        for g in grads:  # None on all ranks, or on none
            if g is None:
                back.append(None)
                continue
            sizes = [g.numel() if chain.last else 0] * communicator.size
            parts = [g.new_empty(0)] * (communicator.size - 1) + [g]
            came = communicator.all_to_all(parts, sizes, "last state backward")
            back.append(
                torch.stack([c.view(g.shape) for c in came]).sum(0)
                if chain.last
                else torch.zeros_like(g)
            )
        return None, d_token, *back


class _Join(torch.autograd.Function):
    """(token, y, last state) -> (y, last state): whoever goes back through one of them goes back
    through the wavefront."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, y: Tensor, *last: Tensor):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(token)
        return y.clone(), *(s.clone() for s in last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):
        (token,) = (
            ctx.saved_tensors
        )  # under activation checkpointing: compute again what follows before the first move
        return torch.zeros_like(token), *grads


def _rows(pieces: Segments, some: slice) -> Segments:
    return Segments(pieces.index[some], pieces.span.map(lambda t: t[some]), pieces.filled[some])


def _wavefront_plan(cut: SequenceSharding, pieces: Segments, device: torch.device) -> WavefrontPlan:
    """Every rank works out from the layouts who needs what."""
    rows, number, slots = pieces.index.shape
    ranks, each, mine = cut.ranks, cut.layouts[0].each, number // cut.ranks
    order = torch.stack([layout.order() for layout in cut.layouts]).expand(rows, -1)
    token = pieces.index.view(rows, ranks, mine * slots)
    lies = order.gather(1, token.clamp_min(0).flatten(1)).view(
        token.shape
    )  # in the ranks' tokens laid end to end
    home = torch.where(token >= 0, lies // each, -1)
    local = torch.arange(rows)[:, None] * each
    held = [(local + lies[:, r] % each)[home[:, r] == cut.rank] for r in range(ranks)]
    wanted = [(home[:, cut.rank] == r).flatten().nonzero()[:, 0] for r in range(ranks)]
    own = slice(cut.rank * mine, (cut.rank + 1) * mine)
    span = pieces.span.map(lambda t: t.unflatten(1, (number, slots))[:, own].flatten(1))
    return WavefrontPlan(
        Segments(pieces.index[:, own], span, pieces.filled[:, own]),
        cut.rank * mine,
        torch.cat(held).to(device),
        torch.cat(wanted).to(device),
        [len(h) for h in held],
        [len(w) for w in wanted],
    )


def _there(x: Tensor, plan: WavefrontPlan, communicator: Communicator) -> Tensor:
    """[B, c, ...] -> [B, L, ...]: tokens to where they are computed, 0 in empty slots."""
    came = all_to_all_rows(
        x.flatten(0, 1).index_select(0, plan.held), communicator, plan.given, plan.taken, "relay"
    )
    shape = plan.pieces.span.shape
    return (
        came.new_zeros(shape.numel(), *x.shape[2:])
        .index_copy(0, plan.slots, came)
        .unflatten(0, shape)
    )


def _home(y: Tensor, plan: WavefrontPlan, communicator: Communicator, each: int) -> Tensor:
    """[B, L, ...] -> [B, c, ...]: the way back."""
    came = all_to_all_rows(
        y.flatten(0, 1).index_select(0, plan.slots),
        communicator,
        plan.taken,
        plan.given,
        "relay home",
    )
    blank = came.new_zeros(y.shape[0] * each, *y.shape[2:])
    return blank.index_copy(0, plan.held, came).unflatten(0, (y.shape[0], each))
