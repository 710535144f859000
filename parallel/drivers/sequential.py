"""Wavefront driver of SequentialScan: rank r computes the r-th section of every row.

At tick r + b rank r works on group b of the rows, so all ranks are busy except while the wave comes
in and runs out, a share (P - 1) / (m + P - 1) of the ticks with m groups. A rank keeps the
activations of its own section only; one row is not computed faster, many rows are. Tokens are
brought to their section before the first tick and home after the last; in between only states
move, from one rank to the next, and in backward from the next to this one.

A scalar token that passes through every move fixes the order of backward: receive the gradient of
a state, go back through the group, send the gradient of the state that came in, and only then start
the group before. A rank waits for its right neighbour alone and the last rank for none, so there is
no deadlock.

Source: Huang et al. 2019, GPipe (arXiv:1811.06965), for the schedule; there the stages are layers,
here sections of the row.

Letters: B rows, m groups of rows, P ranks, N segments of a row, S slots of a segment, L slots of a
section, c local tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.plans import planned
from models.primitives.sequential import Segments, SequentialScan, StepFunction, run_segments
from models.scores import Tensors
from models.span import Span, to_device
from parallel.collectives import Communicator, Pending, all_to_all_rows
from parallel.sharding import SequenceSharding


def bubble(ranks: int, groups: int) -> float:
    """Returns the share of the ticks in which a rank is idle."""
    return (ranks - 1) / (groups + ranks - 1)


class WavefrontPlan(NamedTuple):
    """The section that one rank computes, and the exchange that brings tokens there and back.

    Attributes:
        pieces: segments of this rank.
        first: number of the first of them in the row.
        held: [sum(given)] int64, local tokens (row * c + token) in the order in which they are
            sent, those for rank 0 first.
        slots: [sum(taken)] int64, slots (row * L + slot) of the tokens that arrive.
        given, taken: numbers of tokens sent to and received from each rank.
    """

    pieces: Segments
    first: int
    held: Tensor
    slots: Tensor
    given: list[int]
    taken: list[int]


class Wavefront(nn.Module):
    """Replaces a SequentialScan whose tokens are sharded over the ranks of `communicator`.

    Args:
        name: name of the scan in `communicator.choices`, where the size of the bubble is logged.
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
        """Runs SequentialScan.forward over the ranks; `span.sharding` says who holds what.

        Both `state` and the returned last state are whole on every rank.
        """
        if span.sharding is None:  # every rank has these tokens: one step of decoding
            return self.core(step, xs, state, span=span, size=size, depth=depth)
        plan = self._plan(span, size, xs[0].device)
        inputs = [_to_sections(x, plan, self.communicator) for x in xs]
        rows = span.shape[0]
        group_rows = min(self.core.rows, rows)
        chain = _RankChain(self.communicator)
        token = torch.zeros((), device=xs[0].device, requires_grad=torch.is_grad_enabled())
        outputs = []
        end_states = []
        for start in range(0, rows, group_rows):
            group = slice(start, start + group_rows)
            group_state = [tensor[group] for tensor in state]
            token, *incoming = _Recv.apply(chain, start == 0, token, *group_state)
            output, outgoing = run_segments(
                step,
                tuple(x[group] for x in inputs),
                tuple(incoming),
                _segments_of_rows(plan.pieces, group),
                depth=depth,
                first=plan.first,
            )
            token = _Send.apply(chain, token, *outgoing)
            outputs.append(output)
            end_states.append(outgoing)
        self._log_bubble(len(outputs))
        whole_states = [torch.cat(parts) for parts in zip(*end_states)]
        token, *last = _Broadcast.apply(chain, token, *whole_states)
        output, *last = _Join.apply(token, torch.cat(outputs), *last)
        local_tokens = span.sharding.layouts[0].tokens_per_rank
        return _to_owners(output, plan, self.communicator, local_tokens), tuple(last)

    @planned
    def _plan(self, span: Span, size: int | None, device: torch.device) -> WavefrontPlan:
        """Returns the plan of these addresses, built at the first call."""

        def build() -> WavefrontPlan:
            pieces = self.core.pieces(span.sharding.whole, size, self.communicator.size)
            return _wavefront_plan(span.sharding, pieces, device)

        return span.cache.get(("hand on", self.core.cutter, size), build)

    def _log_bubble(self, groups: int) -> None:
        """Records the size of the bubble when it has changed."""
        if groups != self.groups:
            ranks = self.communicator.size
            share = f"{bubble(ranks, groups):.0%}"
            self.communicator.choices[self.name] = (
                f"wavefront over {ranks} ranks, {groups} groups of rows: bubble {share}"
            )
        self.groups = groups


class _RankChain:
    """Point-to-point moves of one forward pass and its backward.

    It keeps every tensor in flight alive until the send has completed.
    """

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
        target = self.communicator.rank + step
        self.under_way.append(self.communicator.send(tensors, target, name))

    def settle(self) -> None:
        """Waits until all sends have completed."""
        for pending in self.under_way:
            pending.wait()
        self.under_way.clear()


class _Recv(torch.autograd.Function):
    """(token, state before the row) -> (token, state before the section)."""

    @staticmethod
    def forward(ctx: Any, chain: _RankChain, opens: bool, token: Tensor, *state: Tensor):
        ctx.args = chain, opens
        if chain.first:
            incoming = [tensor.clone() for tensor in state]
        else:
            incoming = chain.communicator.recv(state, chain.communicator.rank - 1)
        return token.clone(), *incoming

    @staticmethod
    def backward(ctx: Any, d_token: Tensor, *grads: Tensor):
        chain, opens = ctx.args
        if not chain.first:
            chain.send(grads, -1, "state backward")
            # Zeros instead of None, so that every rank has the same graph.
            grads = tuple(torch.zeros_like(gradient) for gradient in grads)
        if opens:
            # The first group is the last one in backward: nothing may be freed before it has left.
            chain.settle()
        return None, None, d_token, *grads


class _Send(torch.autograd.Function):
    """(token, state after the section) -> token; sends the state to the next rank."""

    @staticmethod
    def forward(ctx: Any, chain: _RankChain, token: Tensor, *state: Tensor):
        ctx.chain = chain
        ctx.likes = [(tensor.shape, tensor.dtype) for tensor in state]
        if not chain.last:
            chain.send(state, 1, "state")
        return token.clone()

    @staticmethod
    def backward(ctx: Any, d_token: Tensor):
        chain = ctx.chain
        gradients = []
        for shape, dtype in ctx.likes:
            gradients.append(torch.zeros(shape, dtype=dtype, device=d_token.device))
        if not chain.last:
            gradients = chain.communicator.recv(gradients, chain.communicator.rank + 1)
        return None, d_token, *gradients


class _Broadcast(torch.autograd.Function):
    """(token, state after each rank's section) -> (token, the last rank's state on every rank)."""

    @staticmethod
    def forward(ctx: Any, chain: _RankChain, token: Tensor, *state: Tensor):
        ctx.chain = chain
        ctx.set_materialize_grads(False)
        chain.settle()
        communicator = chain.communicator
        last_state = []
        for tensor in state:
            contribution = tensor if chain.last else tensor.new_empty(0)
            sizes = [0] * (communicator.size - 1) + [tensor.numel()]
            received = communicator.all_to_all(
                [contribution] * communicator.size, sizes, "last state"
            )
            last_state.append(received[-1].view(tensor.shape))
        return token.clone(), *last_state

    @staticmethod
    def backward(ctx: Any, d_token: Tensor | None, *grads: Tensor | None):
        gradients = []
        for gradient in grads:
            # None on all ranks or on none, so skipping the exchange is safe.
            gradients.append(None if gradient is None else _sum_on_last(gradient, ctx.chain))
        return None, d_token, *gradients


def _sum_on_last(gradient: Tensor, chain: _RankChain) -> Tensor:
    """Returns the sum of all ranks' gradients on the last rank, and zeros on the others."""
    communicator = chain.communicator
    sizes = [gradient.numel() if chain.last else 0] * communicator.size
    parts = [gradient.new_empty(0)] * (communicator.size - 1) + [gradient]
    received = communicator.all_to_all(parts, sizes, "last state backward")
    if not chain.last:
        return torch.zeros_like(gradient)
    return torch.stack([part.view(gradient.shape) for part in received]).sum(0)


class _Join(torch.autograd.Function):
    """(token, output, last state) -> (output, last state).

    Ties both results to the token, so that the backward of either runs the whole wavefront.
    """

    @staticmethod
    def forward(ctx: Any, token: Tensor, y: Tensor, *last: Tensor):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(token)
        return y.clone(), *(tensor.clone() for tensor in last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):
        # Under activation checkpointing reading the saved token starts the recomputation, which
        # must be finished before the first move of backward.
        (token,) = ctx.saved_tensors
        return torch.zeros_like(token), *grads


def _segments_of_rows(pieces: Segments, rows: slice) -> Segments:
    span = pieces.span.cut(lambda tensor: tensor[rows])
    return Segments(pieces.index[rows], span, pieces.filled[rows])


def _wavefront_plan(
    sharding: SequenceSharding, pieces: Segments, device: torch.device
) -> WavefrontPlan:
    """Derives the exchange from the layouts alone, so that no rank has to ask another."""
    rows, number, slots = pieces.index.shape
    ranks = sharding.ranks
    local_tokens = sharding.layouts[0].tokens_per_rank
    own_segments = number // ranks
    order = torch.stack([layout.order() for layout in sharding.layouts]).expand(rows, -1)
    token = pieces.index.view(rows, ranks, own_segments * slots)
    # Position of each slot's token in the ranks' tokens laid end to end.
    position = order.gather(1, token.clamp_min(0).flatten(1)).view(token.shape)
    owner = torch.where(token >= 0, position // local_tokens, -1)
    row_start = torch.arange(rows)[:, None] * local_tokens
    held = []
    slots_by_source = []
    for rank in range(ranks):
        local = row_start + position[:, rank] % local_tokens
        held.append(local[owner[:, rank] == sharding.rank])
        slots_by_source.append((owner[:, sharding.rank] == rank).flatten().nonzero()[:, 0])
    own = slice(sharding.rank * own_segments, (sharding.rank + 1) * own_segments)
    span = pieces.span.cut(lambda tensor: tensor.unflatten(1, (number, slots))[:, own].flatten(1))
    return WavefrontPlan(
        pieces=Segments(pieces.index[:, own], span, pieces.filled[:, own]),
        first=sharding.rank * own_segments,
        held=to_device(torch.cat(held), device),
        slots=to_device(torch.cat(slots_by_source), device),
        given=[len(tokens) for tokens in held],
        taken=[len(tokens) for tokens in slots_by_source],
    )


def _to_sections(x: Tensor, plan: WavefrontPlan, communicator: Communicator) -> Tensor:
    """[B, c, ...] -> [B, L, ...]: sends tokens to where they are computed; empty slots are 0."""
    sent = x.flatten(0, 1).index_select(0, plan.held)
    received = all_to_all_rows(sent, communicator, plan.given, plan.taken, "relay")
    shape = plan.pieces.span.shape
    blank = received.new_zeros(shape.numel(), *x.shape[2:])
    return blank.index_copy(0, plan.slots, received).unflatten(0, shape)


def _to_owners(
    output: Tensor, plan: WavefrontPlan, communicator: Communicator, local_tokens: int
) -> Tensor:
    """[B, L, ...] -> [B, c, ...]: sends results back to the ranks that hold their tokens."""
    sent = output.flatten(0, 1).index_select(0, plan.slots)
    received = all_to_all_rows(sent, communicator, plan.taken, plan.given, "relay home")
    rows = output.shape[0]
    blank = received.new_zeros(rows * local_tokens, *output.shape[2:])
    return blank.index_copy(0, plan.held, received).unflatten(0, (rows, local_tokens))
