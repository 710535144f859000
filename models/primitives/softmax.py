"""Softmax attention: a weighted mean over visible keys, the primitive of all attention layers.

Partial means over disjoint keys merge exactly, so a driver needs no other property to spread a row
over ranks. The primitive has no parameters: the layer that calls it owns them and passes them in.

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

# Arguments of `LocalAttention.forward` before its tensors; they get no gradient.
UNDIFFERENTIATED = 6


class Softmax(Primitive):
    """Attention under a mask and a score, over the tokens of one device.

    Args:
        mask: the keys that a query may see.
        score: the computation on queries and keys before the softmax.
        extends: whether the keys at hand continue those before them in the row (Span.past). False
            where every call brings all keys, as in cross-attention.
    """

    continues_rows = True

    def __init__(self, mask: Mask, score: Score | None = None, *, extends: bool = True):
        super().__init__()
        self.extends = extends
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
        """Returns the mean over every visible key, [B, T, H, E].

        Args:
            query: tensors [B, T, ...] addressed by `span`; the score defines them (by default
                q [B, T, H, D]).
            payload: tensors [B, S, ...] addressed by `kv_span` (by default k and v
                [B, S, G, D or E]).
            params: tensors that the layer owns and the score uses.
            span: addresses of the queries.
            kv_span: addresses of the keys; those of the queries by default.
            heads: [H] global numbers of the heads in these tensors; all of them by default.
        """
        if span.past is not None:
            return span.past.attend(
                self,
                query,
                payload,
                params,
                span=span,
                kv_span=span if kv_span is None else kv_span,
                heads=heads,
            )
        mean, _ = self.partial(
            query, payload, params, span=span, kv_span=kv_span, heads=heads, lse=False
        )
        return mean

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
        """Returns (mean [B, T, H, E], lse [B, T, H] in nats), which `merge_partials` can join.

        A sink belongs to the whole row of keys: with one, partial means must not be merged.

        Args:
            lse: whether the gradient of the lse is used. False lets fast kernels serve.
        """
        spec = attention_spec(self.mask, self.score, query, heads, general=lse)
        kv_span = span if kv_span is None else kv_span
        return LocalAttention.apply(
            spec, self.kept, span, kv_span, len(query), len(payload), *query, *payload, *params
        )


def attention_spec(
    mask: Mask, score: Score, query: Tensors, heads: Tensor | None, general: bool = False
) -> blockwise.AttentionSpec:
    """Describes an attention, with the global numbers of its heads filled in."""
    if heads is None:
        heads = torch.arange(head_count(score, query), device=query[0].device)
    return blockwise.AttentionSpec(score, mask, heads, general)


def head_count(score: Score, query: Tensors) -> int:
    """Returns the number of heads in the tensors of a query."""
    head_dim = score.query_heads[0]
    return 1 if head_dim is None else query[0].shape[head_dim]


def value_width(score: Score, payload: Tensors, params: Tensors, query: Tensors) -> int:
    """Width E of the values that a score makes, without computing any."""
    # A score may build values out of several tensors; of no tokens it builds them for free.
    no_queries = [tensor[:, :0] for tensor in query]
    no_keys = [tensor[:, :0] for tensor in payload]
    _, _, value = score.operands(no_queries, no_keys, params)
    return value.shape[-1]


def add_sink(score: Score, params: Tensors, total: Partial) -> None:
    """Lets every query see one more key, which takes weight and has no value. In place."""
    sink = score.sink(params)
    if sink is None:
        return
    mean, lse = total
    with_sink = torch.logaddexp(lse, sink.to(lse.dtype).expand_as(lse))
    mean.mul_((lse - with_sink).exp()[..., None])
    lse.copy_(with_sink)


def sink_gradient(
    score: Score, params: Tensors, total: Partial, delta: Tensor, into: blockwise.Gradients
) -> None:
    """Adds the gradient of the sink logit to `into`.

    Each query contributes -delta times the weight that its sink took.
    """
    leaves = [parameter.detach().requires_grad_() for parameter in params]
    with torch.enable_grad():
        sink = score.sink(leaves)
    if sink is None:
        return
    _, lse = total
    weight = (sink.detach().to(delta.dtype) - lse).exp()
    d_sink = -(weight * delta).sum((0, 1)).to(sink.dtype)
    gradients = torch.autograd.grad(sink, leaves, d_sink, allow_unused=True)
    for accumulator, gradient in zip(into.params, gradients):
        if gradient is not None:
            accumulator += gradient


class LocalAttention(torch.autograd.Function):
    """Attention on one device. Saves inputs, mean and lse; never a matrix of scores."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: blockwise.AttentionSpec,
        replay: AttentionReplay,
        span: Span,
        kv_span: Span,
        queries: int,
        payloads: int,
        *tensors: Tensor,
    ) -> Partial:
        query, payload, params = split_tensors(tensors, queries, payloads)

        def compute() -> Partial:
            width = value_width(spec.score, payload, params, query)
            total = blockwise.empty_partial(query, len(spec.heads), width)
            blockwise.forward(spec, query, payload, params, span, kv_span, total)
            add_sink(spec.score, params, total)
            return total[0].to(query[0].dtype), total[1]

        mean, lse = replay.replay_or_compute(compute)
        ctx.spec = spec
        ctx.spans = (span, kv_span)
        ctx.counts = (queries, payloads)
        ctx.save_for_backward(mean, lse, *tensors)
        # Most callers drop the lse: zeros as its gradient would cost a tensor and a subtraction.
        ctx.set_materialize_grads(False)
        return mean, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):
        mean, lse, *tensors = ctx.saved_tensors
        query, payload, params = split_tensors(tensors, *ctx.counts)
        d_out, delta, total = incoming_gradients(grads[0], grads[1], mean, lse)
        into = blockwise.Gradients.zeros(query, payload, params)
        blockwise.backward(
            ctx.spec,
            query,
            payload,
            params,
            *ctx.spans,
            d_out=d_out,
            total=total,
            delta=delta,
            into=into,
        )
        sink_gradient(ctx.spec.score, params, total, delta, into)
        sums = (*into.query, *into.payload, *into.params)
        gradients = []
        for gradient, tensor in zip(sums, tensors, strict=True):
            gradients.append(gradient.to(tensor.dtype))
        return *[None] * UNDIFFERENTIATED, *gradients


def split_tensors(
    tensors: Tensors, queries: int, payloads: int
) -> tuple[Tensors, Tensors, Tensors]:
    """Splits one flat tuple into (query, payload, params)."""
    query = tensors[:queries]
    payload = tensors[queries : queries + payloads]
    params = tensors[queries + payloads :]
    return query, payload, params


def incoming_gradients(
    d_out: Tensor | None, d_lse: Tensor | None, mean: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Partial]:
    """Returns (d_out, delta, (mean, lse)) for the backward pass of every block, all wide.

    `delta` [B, T, H] is the sum over E of d_out * mean, less the gradient of the lse.
    """
    total = mean.to(lse.dtype), lse
    if d_out is None:
        d_out = torch.zeros_like(total[0])
    else:
        # The gradient of a sum is an expanded scalar; kernels want contiguous memory.
        d_out = d_out.to(lse.dtype).contiguous()
    delta = (d_out * total[0]).sum(-1)
    if d_lse is not None:
        delta = delta - d_lse
    return d_out, delta, total
