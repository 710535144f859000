"""Ring attention: every rank keeps its queries, keys and values go round, partial attentions merge.

Source: Liu et al. 2023 (arXiv:2310.01889). Ours differs in three ways: one autograd function around
the whole exchange that saves only what is local and sends the payload round again in backward;
whatever the score's payload is goes round (latents, keys and values, gates); a rank's own keys come
last in backward, so that gradients come home after size - 1 hops.

Letters: B rows, T queries, H heads, E value width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.kernels import blockwise
from models.kernels.reference import Partial
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
from models.scores import Score, Tensors
from models.span import Span
from parallel.collectives import Communicator


class Ring(nn.Module):
    """Stands in for a Softmax whose tokens lie over the ranks of `wire`."""

    def __init__(self, core: Softmax, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

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
        span: Span,
        kv_span: Span | None = None,
        heads: Tensor | None = None,
    ) -> Tensor:
        """As Softmax.forward, over every rank's keys; at.cut (and of.cut) say who holds which."""
        what = attention_spec(self.core.mask, self.core.score, query, heads)
        kv_span = span if kv_span is None else kv_span
        return _Ring.apply(
            what,
            self.core.kept,
            self.communicator,
            span,
            kv_span,
            len(query),
            len(payload),
            *query,
            *payload,
            *params,
        )


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        what: blockwise.AttentionSpec,
        kept: AttentionReplay,
        communicator: Communicator,
        span: Span,
        kv_span: Span,
        queries: int,
        payloads: int,
        *tensors: Tensor,
    ) -> Tensor:
        query, payload, params = split_tensors(tensors, queries, payloads)

        def compute() -> Partial:
            total = blockwise.empty_partial(
                query, len(what.heads), value_width(what.score, payload, params, query)
            )
            here = list(payload)
            for step in range(communicator.size):
                last = step == communicator.size - 1
                coming = None if last else communicator.ring_shift(here, "ring")
                source = (communicator.rank - step) % communicator.size
                blockwise.forward(
                    what, query, here, params, span, kv_span.sharding.spans[source], total
                )
                here = coming.wait() if coming else here
            add_sink(what.score, params, total)
            return total[0].to(query[0].dtype), total[1]

        mean, lse = kept.replay_or_compute(compute)
        ctx.what = what
        ctx.communicator = communicator
        ctx.spans = (span, kv_span)
        ctx.counts = (queries, payloads)
        ctx.save_for_backward(mean, lse, *tensors)
        return mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        communicator = ctx.communicator
        span, kv_span = ctx.spans
        mean, lse, *tensors = ctx.saved_tensors
        query, payload, params = split_tensors(tensors, *ctx.counts)
        d_out, delta, total = incoming_gradients(grads[0], None, mean, lse)
        into = blockwise.Gradients.zeros(query, payload, params)

        def add(here: Tensors, source: int) -> None:
            blockwise.backward(
                ctx.what,
                query,
                here,
                params,
                span,
                kv_span.sharding.spans[source],
                d_out=d_out,
                total=total,
                delta=delta,
                into=into,
            )

        returning = None
        coming = (
            communicator.ring_shift(payload, "ring backward") if communicator.size > 1 else None
        )
        for step in range(1, communicator.size):
            here = coming.wait() if coming else []
            coming = (
                communicator.ring_shift(here, "ring backward")
                if step < communicator.size - 1
                else None
            )
            into.payload = blockwise.Gradients.zeros((), payload, ()).payload
            add(here, (communicator.rank - step) % communicator.size)
            _join(into.payload, returning)  # what the ranks before found for these same keys
            returning = communicator.ring_shift(into.payload, "ring gradients")
        into.payload = blockwise.Gradients.zeros((), payload, ()).payload
        add(payload, communicator.rank)
        _join(into.payload, returning)
        sink_gradient(ctx.what.score, params, total, delta, into)
        sums = (*into.query, *into.payload, *into.params)
        return *[None] * 7, *(g.to(t.dtype) for g, t in zip(sums, tensors, strict=True))


def _join(sums: list[Tensor], arrival: Any) -> None:
    if arrival is not None:
        for mine, theirs in zip(sums, arrival.wait()):
            mine += theirs
