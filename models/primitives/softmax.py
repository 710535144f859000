"""Softmax: a weighted mean over visible keys. Partial means over disjoint keys merge, which is all
a driver needs.

A leaf without parameters: the layer that calls it owns them and passes them in.
Letters: B rows, T queries, S keys, H heads, E value width.
"""

from typing import Any

import torch
from torch import Tensor

from models.kernels import blockwise
from models.kernels.reference import Partial
from models.masks.algebra import Mask
from models.primitive import Primitive
from models.primitives.attention_tape import AttentionReplay
from models.scores import Score, Tensors
from models.span import Span


class Softmax(Primitive):
    """Attention under a mask and a score, over the tokens at hand.

    Args:
        mask: which keys a query may see.
        score: what becomes of queries and keys before the softmax.
    """

    def __init__(self, mask: Mask, score: Score | None = None):
        super().__init__()
        self.mask = mask
        self.score = score or Score()
        self.kept = AttentionReplay()

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
        """[B, T, H, E]: the mean over every visible key.

        Args:
            query: tensors [B, T, ...] addressed by `at`; what they are, the score says (by default
                q [B, T, H, D]).
            payload: tensors [B, S, ...] addressed by `of` (by default k and v [B, S, G, D or E]).
            params: what the layer owns and the score uses.
            of: addresses of the keys; the queries' own by default.
            heads: [H] global numbers of the heads at hand; all of them by default.
        """
        return self.partial(
            query, payload, params, span=span, kv_span=kv_span, heads=heads, lse=False
        )[0]

    def partial(
        self,
        query: Tensors,
        payload: Tensors,
        params: Tensors = (),
        *,
        span: Span,
        kv_span: Span | None = None,
        heads: Tensor | None = None,
        lse: bool = True,
    ) -> Partial:
        """(mean [B, T, H, E], mass [B, T, H] in nats): as forward, in a form that `walk.merge` can
        join.

        `mass=False` promises that the gradient of the mass is not used, which lets fast kernels
        serve.
        A sink belongs to the whole row of keys: with one, partial means must not be merged.
        """
        what = attention_spec(self.mask, self.score, query, heads, general=lse)
        kv_span = span if kv_span is None else kv_span
        return _Local.apply(
            what, self.kept, span, kv_span, len(query), len(payload), *query, *payload, *params
        )


def attention_spec(
    mask: Mask, score: Score, query: Tensors, heads: Tensor | None, general: bool = False
) -> blockwise.AttentionSpec:
    """What is to be computed, with the heads' global numbers filled in."""
    if heads is None:
        dim = score.query_heads[0]
        heads = torch.arange(query[0].shape[dim] if dim is not None else 1, device=query[0].device)
    return blockwise.AttentionSpec(score, mask, heads, general)


def value_width(score: Score, payload: Tensors, params: Tensors, query: Tensors) -> int:
    """Width E of the values, without computing any."""
    none = [t[:, :0] for t in payload]
    return score.operands([t[:, :0] for t in query], none, params)[2].shape[-1]


def add_sink(score: Score, params: Tensors, total: Partial) -> None:
    """Let every query see a key without a value: it takes weight and gives nothing. In place."""
    sink = score.sink(params)
    if sink is None:
        return
    lse = torch.logaddexp(total[1], sink.to(total[1].dtype).expand_as(total[1]))
    total[0].mul_((total[1] - lse).exp()[..., None])
    total[1].copy_(lse)


def sink_gradient(
    score: Score, params: Tensors, total: Partial, delta: Tensor, into: blockwise.Gradients
) -> None:
    """Add the gradient of the sink logit: each query gives -delta times the weight that its sink
    took."""
    leaves = [p.detach().requires_grad_() for p in params]
    with torch.enable_grad():
        sink = score.sink(leaves)
    if sink is None:
        return
    weight = (sink.detach().to(delta.dtype) - total[1]).exp()
    grads = torch.autograd.grad(
        sink, leaves, -(weight * delta).sum((0, 1)).to(sink.dtype), allow_unused=True
    )
    for add_to, grad in zip(into.params, grads):
        if grad is not None:
            add_to += grad


class _Local(torch.autograd.Function):
    """One device: all keys are at hand. Saves its inputs, the mean and the mass; never a matrix of
    scores."""

    @staticmethod
    def forward(
        ctx: Any,
        what: blockwise.AttentionSpec,
        kept: AttentionReplay,
        span: Span,
        kv_span: Span,
        queries: int,
        payloads: int,
        *tensors: Tensor,
    ) -> Partial:
        query, payload, params = split_tensors(tensors, queries, payloads)

        def compute() -> Partial:
            total = blockwise.empty_partial(
                query, len(what.heads), value_width(what.score, payload, params, query)
            )
            blockwise.forward(what, query, payload, params, span, kv_span, total)
            add_sink(what.score, params, total)
            return total[0].to(query[0].dtype), total[1]

        mean, lse = kept.replay_or_compute(compute)
        ctx.what = what
        ctx.spans = (span, kv_span)
        ctx.counts = (queries, payloads)
        ctx.save_for_backward(mean, lse, *tensors)
        ctx.set_materialize_grads(False)
        return mean, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):
        mean, lse, *tensors = ctx.saved_tensors
        query, payload, params = split_tensors(tensors, *ctx.counts)
        d_out, delta, total = incoming_gradients(grads[0], grads[1], mean, lse)
        into = blockwise.Gradients.zeros(query, payload, params)
        blockwise.backward(
            ctx.what,
            query,
            payload,
            params,
            *ctx.spans,
            d_out=d_out,
            total=total,
            delta=delta,
            into=into,
        )
        sink_gradient(ctx.what.score, params, total, delta, into)
        sums = (*into.query, *into.payload, *into.params)
        return *[None] * 6, *(g.to(t.dtype) for g, t in zip(sums, tensors, strict=True))


def split_tensors(
    tensors: Tensors, queries: int, payloads: int
) -> tuple[Tensors, Tensors, Tensors]:
    """(query, payload, params) out of one flat tuple."""
    return tensors[:queries], tensors[queries : queries + payloads], tensors[queries + payloads :]


def incoming_gradients(
    d_out: Tensor | None, d_lse: Tensor | None, mean: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Partial]:
    """What every block's backward needs: (d_mean, delta, (mean, mass)), all wide and contiguous."""
    total = mean.to(lse.dtype), lse
    d_out = torch.zeros_like(total[0]) if d_out is None else d_out.to(lse.dtype).contiguous()
    delta = (d_out * total[0]).sum(-1)
    return d_out, delta if d_lse is None else delta - d_lse, total
