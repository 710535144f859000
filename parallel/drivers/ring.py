"""Ring attention: every rank keeps its queries, keys and values go round, partial attentions merge.

Source: Liu et al. 2023 (arXiv:2310.01889). Ours differs in three ways: one autograd function around the whole exchange that
saves only what is local and sends the payload round again in backward; whatever the score's payload is goes round (latents,
keys and values, gates); a rank's own keys come last in backward, so that gradients come home after size - 1 hops.

Letters: B rows, T queries, H heads, E value width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.kernels import walk
from models.kernels.tile import Part
from models.mixing.kept import Kept
from models.mixing.softmax import Softmax, add_sink, attention, cut, incoming, sink_gradient, value_width
from models.scores import Score, Tensors
from models.span import Span
from parallel.moves import Wire


class Ring(nn.Module):
    """Stands in for a Softmax whose tokens lie over the ranks of `wire`."""

    def __init__(self, core: Softmax, wire: Wire):
        super().__init__()
        self.core, self.wire = core, wire

    @property
    def score(self) -> Score:
        """What becomes of queries and keys before the softmax."""
        return self.core.score

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
        what = attention(self.core.mask, self.core.score, query, heads)
        of = at if of is None else of
        return _Ring.apply(what, self.core.kept, self.wire, at, of, len(query), len(payload), *query, *payload, *params)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        what: walk.Attention,
        kept: Kept,
        wire: Wire,
        at: Span,
        of: Span,
        queries: int,
        payloads: int,
        *tensors: Tensor,
    ) -> Tensor:
        query, payload, params = cut(tensors, queries, payloads)

        def compute() -> Part:
            total = walk.blank(query, len(what.heads), value_width(what.score, payload, params, query))
            here = list(payload)
            for step in range(wire.size):
                last = step == wire.size - 1
                coming = None if last else wire.rotate(here, "ring")
                source = (wire.rank - step) % wire.size
                walk.forward(what, query, here, params, at, of.cut.spans[source], total)
                here = coming.wait() if coming else here
            add_sink(what.score, params, total)
            return total[0].to(query[0].dtype), total[1]

        mean, mass = kept.once(compute)
        ctx.what, ctx.wire, ctx.spans, ctx.counts = what, wire, (at, of), (queries, payloads)
        ctx.save_for_backward(mean, mass, *tensors)
        return mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        wire, (at, of) = ctx.wire, ctx.spans
        mean, mass, *tensors = ctx.saved_tensors
        query, payload, params = cut(tensors, *ctx.counts)
        d_mean, delta, total = incoming(grads[0], None, mean, mass)
        into = walk.Gradients.zeros(query, payload, params)

        def add(here: Tensors, source: int) -> None:
            walk.backward(
                ctx.what, query, here, params, at, of.cut.spans[source],
                d_mean=d_mean, total=total, delta=delta, into=into,
            )  # fmt: skip

        returning, coming = None, wire.rotate(payload, "ring backward") if wire.size > 1 else None
        for step in range(1, wire.size):
            here = coming.wait() if coming else []
            coming = wire.rotate(here, "ring backward") if step < wire.size - 1 else None
            into.payload = walk.Gradients.zeros((), payload, ()).payload
            add(here, (wire.rank - step) % wire.size)
            _join(into.payload, returning)  # what the ranks before found for these same keys
            returning = wire.rotate(into.payload, "ring gradients")
        into.payload = walk.Gradients.zeros((), payload, ()).payload
        add(payload, wire.rank)
        _join(into.payload, returning)
        sink_gradient(ctx.what.score, params, total, delta, into)
        sums = (*into.query, *into.payload, *into.params)
        return *[None] * 7, *(g.to(t.dtype) for g, t in zip(sums, tensors, strict=True))


def _join(sums: list[Tensor], arrival: Any) -> None:
    if arrival is not None:
        for mine, theirs in zip(sums, arrival.wait()):
            mine += theirs
