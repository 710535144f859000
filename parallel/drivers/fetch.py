"""Fetch: every rank gets those keys of other ranks that its queries can see, and no others, then attends once.

A window becomes an exchange with neighbours, packed documents send only what they share, a source of another length is
cross-attention, and the dense case is the all-gather. Every rank works out from the addresses what each other rank needs,
so nobody asks. Backward fetches again: no rank keeps keys of another between the two.

Source: Llama 3 (arXiv:2407.21783, section 3.3.2) gathers all keys; Tao et al. 2025, MagiAttention, only needed ranges. Ours
plans by single tokens, from any mask, and sums the gradients that come home in float32.

Letters: B rows, T queries, S local keys, F fetched keys of a row, P ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.kernels import walk
from models.kernels.plan import MASKED, plan
from models.kernels.tile import Part, wide
from models.masks import Mask, visible
from models.mixing.kept import Kept
from models.mixing.softmax import Softmax, add_sink, attention, cut, incoming, sink_gradient, value_width
from models.scores import Tensors
from models.span import PADDING, TEXT, Span
from parallel.moves import Wire


@dataclass(frozen=True)
class Need:
    """What travels for one mask and one pair of spans.

    Attributes:
        gives: for each rank the flat numbers (row x S + token) of the keys it needs of this one, itself included.
        takes: how many keys come from each rank.
        place: [B, F] where, among all keys that come, each fetched key is found; what is left over points one beyond.
        span: [B, F] addresses of the fetched keys, in global order.
    """

    gives: tuple[Tensor, ...]
    takes: tuple[int, ...]
    place: Tensor
    span: Span


def needed(mask: Mask, at: Span, of: Span, heads: Tensor) -> Tensor:
    """[B, S] bool on the CPU: the keys `of` that at least one query `at` sees."""
    seen = torch.zeros(of.shape, dtype=torch.bool)
    for block in plan(mask, at, of):
        rows, q, k = slice(block.r0, block.r1), slice(block.q0, block.q1), slice(block.k0, block.k1)
        if block.kind == MASKED:
            look = visible(mask, at.map(lambda t, r=rows, x=q: t[r, x]), of.map(lambda t, r=rows, x=k: t[r, x]), heads)
            seen[rows, k] |= look.any(2).any(1).cpu()
        else:
            seen[rows, k] = True
    return seen


def need(mask: Mask, at: Span, of: Span, heads: Tensor) -> Need:
    """What has to travel so that every rank sees what its queries may see; worked out once, kept on the cut."""
    kept, key = at.cut.kept, ("need", mask, id(of.cut), len(heads))
    if key not in kept:
        kept[key] = (of, _need(mask, at, of, heads))  # holding `of` keeps its id from being used again
    return kept[key][1]


def _need(mask: Mask, at: Span, of: Span, heads: Tensor) -> Need:
    me, device = at.cut.rank, of.pos.device
    gives = [needed(mask, other, of.cut.spans[me], heads).flatten().nonzero()[:, 0] for other in at.cut.spans]
    wanted = [needed(mask, at.cut.spans[me], other, heads) for other in of.cut.spans]
    takes = [int(w.sum()) for w in wanted]
    numbers = torch.cat([of.cut.index(r, len(w)) for r, w in enumerate(wanted)], 1)
    chosen = torch.cat(wanted, 1)
    arrivals = torch.cat([  # the place of each chosen key in what comes: rank by rank, then row by row
        (w.flatten().cumsum(0) - 1 + sum(takes[:r])).view_as(w) for r, w in enumerate(wanted)
    ], 1)  # fmt: skip
    beyond = torch.iinfo(torch.int64).max
    order = torch.where(chosen, numbers, beyond).argsort(1)[:, : int(chosen.sum(1).max())]
    there = chosen.gather(1, order)
    place = torch.where(there, arrivals.gather(1, order), sum(takes))

    def address(field: str, fill: int) -> Tensor:
        every = torch.cat([getattr(s, field) for s in of.cut.spans], 1)
        return torch.where(there.to(device), every.gather(1, order.to(device)), fill)

    span = Span(address("pos", 0), address("doc", PADDING), address("role", TEXT))
    return Need(tuple(g.to(device) for g in gives), tuple(takes), place.to(device), span)


def fetch(payload: Tensors, plan: Need, wire: Wire, name: str) -> list[Tensor]:
    """[B, S, ...] of every rank -> [B, F, ...]: the keys this rank needs; zeros where a row needs fewer."""
    out = []
    for x in payload:
        flat, each = x.flatten(0, 1), x[0, 0].numel() if x.numel() else 0
        parts = [flat.index_select(0, g) for g in plan.gives]
        came = torch.cat(wire.exchange(parts, [n * each for n in plan.takes], name))
        came = torch.cat([came.view(-1, *x.shape[2:]), x.new_zeros(1, *x.shape[2:])])
        out.append(came[plan.place])
    return out


def give_back(grads: Tensors, payload: Tensors, plan: Need, wire: Wire, name: str) -> list[Tensor]:
    """The adjoint of `fetch`: [B, F, ...] gradients go home, [B, S, ...] sums of what came from every rank, wide."""
    out = []
    for grad, x in zip(grads, payload, strict=True):
        total = sum(plan.takes)
        came = grad.new_zeros(total + 1, *x.shape[2:])
        came[plan.place] = grad  # every key was fetched into one place; only the filler beyond is written more than once
        parts = wire.exchange(came[:total].split(list(plan.takes)), [g.numel() * x[0, 0].numel() for g in plan.gives], name)
        sums = torch.zeros_like(x, dtype=wide(x.dtype), memory_format=torch.contiguous_format)
        for index, part in zip(plan.gives, parts):
            sums.flatten(0, 1).index_add_(0, index, part.view(-1, *x.shape[2:]))
        out.append(sums)
    return out


class Fetch(nn.Module):
    """Stands in for a Softmax whose tokens lie over the ranks of `wire`."""

    def __init__(self, core: Softmax, wire: Wire):
        super().__init__()
        self.core, self.wire = core, wire

    def forward(
        self,
        query: Tensors,
        payload: Tensors,
        params: Tensors = (),
        *,
        at: Span,
        of: Span | None = None,
        heads: Tensor | None = None,
    ) -> Tensor:
        """As Softmax.forward, over every rank's keys; at.cut (and of.cut) say who holds which."""
        what, of = attention(self.core.mask, self.core.score, query, heads), at if of is None else of
        plan = need(what.mask, at, of, what.heads)
        return _Fetch.apply(what, self.core.kept, self.wire, plan, at, len(query), len(payload), *query, *payload, *params)


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        what: walk.Attention,
        kept: Kept,
        wire: Wire,
        plan: Need,
        at: Span,
        queries: int,
        payloads: int,
        *tensors: Tensor,
    ) -> Tensor:
        query, payload, params = cut(tensors, queries, payloads)

        def compute() -> Part:
            total = walk.blank(query, len(what.heads), value_width(what.score, payload, params, query))
            walk.forward(what, query, fetch(payload, plan, wire, "fetch"), params, at, plan.span, total)
            add_sink(what.score, params, total)
            return total[0].to(query[0].dtype), total[1]

        mean, mass = kept.once(compute)
        ctx.what, ctx.wire, ctx.plan, ctx.at, ctx.counts = what, wire, plan, at, (queries, payloads)
        ctx.save_for_backward(mean, mass, *tensors)
        return mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        what, wire, plan, at = ctx.what, ctx.wire, ctx.plan, ctx.at
        mean, mass, *tensors = ctx.saved_tensors
        query, payload, params = cut(tensors, *ctx.counts)
        d_mean, delta, total = incoming(grads[0], None, mean, mass)
        here = fetch(payload, plan, wire, "fetch backward")
        into = walk.Gradients.zeros(query, here, params)
        walk.backward(what, query, here, params, at, plan.span, d_mean=d_mean, total=total, delta=delta, into=into)
        sink_gradient(what.score, params, total, delta, into)
        into.payload = give_back(into.payload, payload, plan, wire, "fetch gradients")
        sums = (*into.query, *into.payload, *into.params)
        return *[None] * 7, *(g.to(t.dtype) for g, t in zip(sums, tensors, strict=True))
