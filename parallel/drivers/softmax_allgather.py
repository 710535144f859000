"""Fetch: every rank gets those keys of other ranks that its queries can see, and no others, then
attends once.

A window becomes an exchange with neighbours, packed documents send only what they share, a source
of another length is cross-attention, and the dense case is the all-gather. Every rank works out
from the addresses what each other rank needs, so nobody asks. Backward fetches again: no rank keeps
keys of another between the two.

Source: Llama 3 (arXiv:2407.21783, section 3.3.2) gathers all keys; Tao et al. 2025, MagiAttention,
only needed ranges. Ours plans by single tokens, from any mask, and sums the gradients that come
home in float32.

Letters: B rows, T queries, S local keys, F fetched keys of a row, P ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.kernels import blockwise
from models.kernels.block_plan import PARTIAL_TILE, plan_tiles
from models.kernels.reference import Partial, accumulation_dtype
from models.masks.algebra import Mask, visible
from models.primitives.attention_tape import AttentionReplay
from models.primitives.softmax import (
    Softmax,
    add_sink,
    attention_spec,
    incoming_gradients,
    sink_gradient,
    split_tensors,
    value_width,
)
from models.scores import Tensors
from models.span import PADDING, TEXT, Span
from parallel.collectives import Communicator


@dataclass(frozen=True)
class GatherPlan:
    """What travels for one mask and one pair of spans.

    Attributes: gives: for each rank the flat numbers (row x S + token) of the keys it needs of this
        one, itself included. takes: how many keys come from each rank. place: [B, F] where, among
        all keys that come, each fetched key is found; what is left over points one beyond. span:
        [B, F] addresses of the fetched keys, in global order.
    """

    gives: tuple[Tensor, ...]
    takes: tuple[int, ...]
    place: Tensor
    span: Span


def needed_tokens(mask: Mask, span: Span, kv_span: Span, heads: Tensor) -> Tensor:
    """[B, S] bool on the CPU: the keys `of` that at least one query `at` sees."""
    seen = torch.zeros(kv_span.shape, dtype=torch.bool)
    for block in plan_tiles(mask, span, kv_span):
        rows = slice(block.r0, block.r1)
        q = slice(block.q0, block.q1)
        k = slice(block.k0, block.k1)
        if block.kind == PARTIAL_TILE:
            look = visible(
                mask,
                span.map(lambda t, r=rows, x=q: t[r, x]),
                kv_span.map(lambda t, r=rows, x=k: t[r, x]),
                heads,
            )
            seen[rows, k] |= look.any(2).any(1).cpu()
        else:
            seen[rows, k] = True
    return seen


def gather_plan(mask: Mask, span: Span, kv_span: Span, heads: Tensor) -> GatherPlan:
    """What has to travel so that every rank sees what its queries may see; worked out once, kept on
    the cut."""
    kept = span.sharding.kept
    key = ("need", mask, id(kv_span.sharding), len(heads))
    if key not in kept:
        kept[key] = (
            kv_span,
            _gather_plan(mask, span, kv_span, heads),
        )  # holding `of` keeps its id from being used again
    return kept[key][1]


def _gather_plan(mask: Mask, span: Span, kv_span: Span, heads: Tensor) -> GatherPlan:
    me = span.sharding.rank
    device = kv_span.pos.device
    gives = [
        needed_tokens(mask, other, kv_span.sharding.spans[me], heads).flatten().nonzero()[:, 0]
        for other in span.sharding.spans
    ]
    wanted = [
        needed_tokens(mask, span.sharding.spans[me], other, heads)
        for other in kv_span.sharding.spans
    ]
    takes = [int(w.sum()) for w in wanted]
    numbers = torch.cat([kv_span.sharding.index(r, len(w)) for r, w in enumerate(wanted)], 1)
    chosen = torch.cat(wanted, 1)
    # the place of each chosen key in what comes: rank by rank, then row by row
    arrivals = torch.cat(
        [(w.flatten().cumsum(0) - 1 + sum(takes[:r])).view_as(w) for r, w in enumerate(wanted)], 1
    )
    beyond = torch.iinfo(torch.int64).max
    order = torch.where(chosen, numbers, beyond).argsort(1)[:, : int(chosen.sum(1).max())]
    there = chosen.gather(1, order)
    place = torch.where(there, arrivals.gather(1, order), sum(takes))

    def address(field: str, fill: int) -> Tensor:
        every = torch.cat([getattr(s, field) for s in kv_span.sharding.spans], 1)
        return torch.where(there.to(device), every.gather(1, order.to(device)), fill)

    inner_span = Span(address("pos", 0), address("doc", PADDING), address("role", TEXT))
    return GatherPlan(
        tuple(g.to(device) for g in gives), tuple(takes), place.to(device), inner_span
    )


def gather_needed(
    payload: Tensors, plan: GatherPlan, communicator: Communicator, name: str
) -> list[Tensor]:
    """[B, S, ...] of every rank -> [B, F, ...]: the keys this rank needs; zeros where a row needs
    fewer."""
    out = []
    for x in payload:
        flat = x.flatten(0, 1)
        each = x[0, 0].numel() if x.numel() else 0
        parts = [flat.index_select(0, g) for g in plan.gives]
        came = torch.cat(communicator.all_to_all(parts, [n * each for n in plan.takes], name))
        came = torch.cat([came.view(-1, *x.shape[2:]), x.new_zeros(1, *x.shape[2:])])
        out.append(came[plan.place])
    return out


def reduce_to_owner(
    grads: Tensors, payload: Tensors, plan: GatherPlan, communicator: Communicator, name: str
) -> list[Tensor]:
    """The adjoint of `fetch`: [B, F, ...] gradients go home, [B, S, ...] sums of what came from
    every rank, wide."""
    out = []
    for grad, x in zip(grads, payload, strict=True):
        total = sum(plan.takes)
        came = grad.new_zeros(total + 1, *x.shape[2:])
        came[plan.place] = (
            # every key was fetched into one place; only the filler beyond is written more than once
            grad
        )
        parts = communicator.all_to_all(
            came[:total].split(list(plan.takes)),
            [g.numel() * x[0, 0].numel() for g in plan.gives],
            name,
        )
        sums = torch.zeros_like(
            x, dtype=accumulation_dtype(x.dtype), memory_format=torch.contiguous_format
        )
        for index, part in zip(plan.gives, parts):
            sums.flatten(0, 1).index_add_(0, index, part.view(-1, *x.shape[2:]))
        out.append(sums)
    return out


class AllGather(nn.Module):
    """Stands in for a Softmax whose tokens lie over the ranks of `wire`."""

    def __init__(self, core: Softmax, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    def forward(
        self,
        query: Tensors,
        payload: Tensors,
        params: Tensors = (),
        *,
        span: Span,
        kv_span: Span | None = None,
        heads: Tensor | None = None,
    ) -> Tensor:
        """As Softmax.forward, over every rank's keys; at.cut (and of.cut) say who holds which."""
        what = attention_spec(self.core.mask, self.core.score, query, heads)
        kv_span = span if kv_span is None else kv_span
        plan = gather_plan(what.mask, span, kv_span, what.heads)
        return _AllGather.apply(
            what,
            self.core.kept,
            self.communicator,
            plan,
            span,
            len(query),
            len(payload),
            *query,
            *payload,
            *params,
        )


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        what: blockwise.AttentionSpec,
        kept: AttentionReplay,
        communicator: Communicator,
        plan: GatherPlan,
        span: Span,
        queries: int,
        payloads: int,
        *tensors: Tensor,
    ) -> Tensor:
        query, payload, params = split_tensors(tensors, queries, payloads)

        def compute() -> Partial:
            total = blockwise.empty_partial(
                query, len(what.heads), value_width(what.score, payload, params, query)
            )
            blockwise.forward(
                what,
                query,
                gather_needed(payload, plan, communicator, "allgather"),
                params,
                span,
                plan.span,
                total,
            )
            add_sink(what.score, params, total)
            return total[0].to(query[0].dtype), total[1]

        mean, lse = kept.replay_or_compute(compute)
        ctx.what = what
        ctx.communicator = communicator
        ctx.plan = plan
        ctx.span = span
        ctx.counts = (queries, payloads)
        ctx.save_for_backward(mean, lse, *tensors)
        return mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        what = ctx.what
        communicator = ctx.communicator
        plan = ctx.plan
        span = ctx.span
        mean, lse, *tensors = ctx.saved_tensors
        query, payload, params = split_tensors(tensors, *ctx.counts)
        d_out, delta, total = incoming_gradients(grads[0], None, mean, lse)
        here = gather_needed(payload, plan, communicator, "fetch backward")
        into = blockwise.Gradients.zeros(query, here, params)
        blockwise.backward(
            what,
            query,
            here,
            params,
            span,
            plan.span,
            d_out=d_out,
            total=total,
            delta=delta,
            into=into,
        )
        sink_gradient(what.score, params, total, delta, into)
        into.payload = reduce_to_owner(into.payload, payload, plan, communicator, "fetch gradients")
        sums = (*into.query, *into.payload, *into.params)
        return *[None] * 7, *(g.to(t.dtype) for g, t in zip(sums, tensors, strict=True))
