"""Driver of PooledAttention: each rank reads its own tokens, and the partial results are merged.

Points are the same on every rank, so what crosses ranks does not grow with the rows: forward a
partial mean and its mass, backward the gradient of the mean. Each is sent once:

    bytes that a rank sends = (P - 1) B N H (E + 1) forward, (P - 1) B N H E backward, x bytes of a
    number

What is computed from a merged mean is computed alike on all ranks, and its gradient is that of the
rank's own losses: a part of the sum, as every parameter's gradient is.

Letters: B rows, T local tokens, N points of a row, P ranks, H heads, E value width.
"""

from typing import Any

import torch
from torch import Tensor

from models.kernels import blockwise
from models.primitives.attention_tape import AttentionReplay
from models.primitives.pooled_attention import Points, PooledAttention, points_of
from models.primitives.softmax import (
    attention_spec,
    incoming_gradients,
    split_tensors,
    value_width,
)
from models.scores import Tensors
from models.span import Span
from parallel.collectives import Communicator

UNDIFFERENTIATED = 6  # arguments of `_Merged.forward` before its tensors


class MergedPooledAttention(PooledAttention):
    """Replaces a PooledAttention whose tokens are sharded over the ranks of `communicator`."""

    def __init__(self, core: PooledAttention, communicator: Communicator):
        super().__init__(core.score)
        self.core = core
        self.place = core.place
        self.communicator = communicator

    def points(self, span: Span, count: int) -> Points:
        """See PooledAttention; every rank lists the documents of whole rows."""
        if span.sharding is None:  # every rank has these tokens
            return self.core.points(span, count)
        return points_of(span, span.sharding.whole, count)

    def forward(self, query: Tensors, payload: Tensors, *, span: Span, kv_span: Span) -> Tensor:
        """Runs PooledAttention.forward over every rank's tokens."""
        if kv_span.sharding is None:  # every rank has these tokens
            return self.core(query, payload, span=span, kv_span=kv_span)
        spec = attention_spec(self.mask, self.score, query, None)
        return _Merged.apply(
            spec,
            self.core.kept,
            self.communicator,
            span,
            kv_span,
            len(query),
            *query,
            *payload,
        )


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        spec: blockwise.AttentionSpec,
        replay: AttentionReplay,
        communicator: Communicator,
        span: Span,
        kv_span: Span,
        queries: int,
        *tensors: Tensor,
    ) -> Tensor:
        query, payload, _ = split_tensors(tensors, queries, len(tensors) - queries)

        def compute() -> tuple[Tensor, ...]:
            width = value_width(spec.score, payload, (), query)
            part = blockwise.empty_partial(query, len(spec.heads), width)
            blockwise.forward(spec, query, payload, (), span, kv_span, part)
            mean, lse = _merged(part, communicator)
            return mean.to(query[0].dtype), lse

        mean, lse = replay.replay_or_compute(compute)
        ctx.spec = spec
        ctx.communicator = communicator
        ctx.spans = (span, kv_span)
        ctx.queries = queries
        ctx.save_for_backward(mean, lse, *tensors)
        return mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        mean, lse, *tensors = ctx.saved_tensors
        query, payload, _ = split_tensors(tensors, ctx.queries, len(tensors) - ctx.queries)
        # A rank knows what its own losses ask of a mean; its keys answer for those of all ranks.
        parts = _from_all(grads[0].to(lse.dtype), ctx.communicator, "pool backward")
        d_out, delta, total = incoming_gradients(torch.stack(parts).sum(0), None, mean, lse)
        into = blockwise.Gradients.zeros(query, payload, ())
        blockwise.backward(
            ctx.spec,
            query,
            payload,
            (),
            *ctx.spans,
            d_out=d_out,
            total=total,
            delta=delta,
            into=into,
        )
        gradients = []
        for gradient, tensor in zip((*into.query, *into.payload), tensors, strict=True):
            gradients.append(gradient.to(tensor.dtype))
        return *[None] * UNDIFFERENTIATED, *gradients


def _merged(part: blockwise.reference.Partial, communicator: Communicator) -> tuple[Tensor, Tensor]:
    """Joins the partial attentions of all ranks in rank order, so that all get the same bits."""
    mean, lse = part
    packed = torch.cat([mean, lse[..., None]], -1)
    first, *others = _from_all(packed, communicator, "pool")
    total = first[..., :-1], first[..., -1]
    for other in others:
        total = blockwise.merge_partials(total, (other[..., :-1], other[..., -1]))
    return total[0].contiguous(), total[1].contiguous()


def _from_all(x: Tensor, communicator: Communicator, name: str) -> list[Tensor]:
    """Returns what every rank has, all of the shape of `x`."""
    size = communicator.size
    parts = communicator.all_to_all([x] * size, [x.numel()] * size, name)
    return [part.view(x.shape) for part in parts]
