"""Softmax: a weighted mean over visible keys. Partial means over disjoint keys merge, which is all a driver needs.

A leaf without parameters: the layer that calls it owns them and passes them in.
Letters: B rows, T queries, S keys, H heads, E value width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.kernels import walk
from models.kernels.tile import Part
from models.masks import Mask
from models.mixing.kept import Kept
from models.scores import Score, Tensors
from models.span import Span


class Softmax(nn.Module):
    """Attention under a mask and a score, over the tokens at hand.

    Args:
        mask: which keys a query may see.
        score: what becomes of queries and keys before the softmax.
    """

    def __init__(self, mask: Mask, score: Score | None = None):
        super().__init__()
        self.mask, self.score, self.kept = mask, score or Score(), Kept()

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
        """[B, T, H, E]: the mean over every visible key.

        Args:
            query: tensors [B, T, ...] addressed by `at`; what they are, the score says (by default q [B, T, H, D]).
            payload: tensors [B, S, ...] addressed by `of` (by default k and v [B, S, G, D or E]).
            params: what the layer owns and the score uses.
            of: addresses of the keys; the queries' own by default.
            heads: [H] global numbers of the heads at hand; all of them by default.
        """
        return self.partial(query, payload, params, at=at, of=of, heads=heads, mass=False)[0]

    def partial(
        self,
        query: Tensors,
        payload: Tensors,
        params: Tensors = (),
        *,
        at: Span,
        of: Span | None = None,
        heads: Tensor | None = None,
        mass: bool = True,
    ) -> Part:
        """(mean [B, T, H, E], mass [B, T, H] in nats): as forward, in a form that `walk.merge` can join.

        `mass=False` promises that the gradient of the mass is not used, which lets fast kernels serve.
        A sink belongs to the whole row of keys: with one, partial means must not be merged.
        """
        what = attention(self.mask, self.score, query, heads, general=mass)
        of = at if of is None else of
        return _Local.apply(what, self.kept, at, of, len(query), len(payload), *query, *payload, *params)


def attention(mask: Mask, score: Score, query: Tensors, heads: Tensor | None, general: bool = False) -> walk.Attention:
    """What is to be computed, with the heads' global numbers filled in."""
    if heads is None:
        dim = score.query_heads[0]
        heads = torch.arange(query[0].shape[dim] if dim is not None else 1, device=query[0].device)
    return walk.Attention(score, mask, heads, general)


def value_width(score: Score, payload: Tensors, params: Tensors, query: Tensors) -> int:
    """Width E of the values, without computing any."""
    none = [t[:, :0] for t in payload]
    return score.operands([t[:, :0] for t in query], none, params)[2].shape[-1]


def add_sink(score: Score, params: Tensors, total: Part) -> None:
    """Let every query see a key without a value: it takes weight and gives nothing. In place."""
    sink = score.sink(params)
    if sink is None:
        return
    mass = torch.logaddexp(total[1], sink.to(total[1].dtype).expand_as(total[1]))
    total[0].mul_((total[1] - mass).exp()[..., None])
    total[1].copy_(mass)


def sink_gradient(score: Score, params: Tensors, total: Part, delta: Tensor, into: walk.Gradients) -> None:
    """Add the gradient of the sink logit: each query gives -delta times the weight that its sink took."""
    leaves = [p.detach().requires_grad_() for p in params]
    with torch.enable_grad():
        sink = score.sink(leaves)
    if sink is None:
        return
    weight = (sink.detach().to(delta.dtype) - total[1]).exp()
    grads = torch.autograd.grad(sink, leaves, -(weight * delta).sum((0, 1)).to(sink.dtype), allow_unused=True)
    for add_to, grad in zip(into.params, grads):
        if grad is not None:
            add_to += grad


class _Local(torch.autograd.Function):
    """One device: all keys are at hand. Saves its inputs, the mean and the mass; never a matrix of scores."""

    @staticmethod
    def forward(
        ctx: Any, what: walk.Attention, kept: Kept, at: Span, of: Span, queries: int, payloads: int, *tensors: Tensor
    ) -> Part:
        query, payload, params = cut(tensors, queries, payloads)

        def compute() -> Part:
            total = walk.blank(query, len(what.heads), value_width(what.score, payload, params, query))
            walk.forward(what, query, payload, params, at, of, total)
            add_sink(what.score, params, total)
            return total[0].to(query[0].dtype), total[1]

        mean, mass = kept.once(compute)
        ctx.what, ctx.spans, ctx.counts = what, (at, of), (queries, payloads)
        ctx.save_for_backward(mean, mass, *tensors)
        ctx.set_materialize_grads(False)
        return mean, mass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):
        mean, mass, *tensors = ctx.saved_tensors
        query, payload, params = cut(tensors, *ctx.counts)
        d_mean, delta, total = incoming(grads[0], grads[1], mean, mass)
        into = walk.Gradients.zeros(query, payload, params)
        walk.backward(ctx.what, query, payload, params, *ctx.spans, d_mean=d_mean, total=total, delta=delta, into=into)
        sink_gradient(ctx.what.score, params, total, delta, into)
        sums = (*into.query, *into.payload, *into.params)
        return *[None] * 6, *(g.to(t.dtype) for g, t in zip(sums, tensors, strict=True))


def cut(tensors: Tensors, queries: int, payloads: int) -> tuple[Tensors, Tensors, Tensors]:
    """(query, payload, params) out of one flat tuple."""
    return tensors[:queries], tensors[queries : queries + payloads], tensors[queries + payloads :]


def incoming(d_mean: Tensor | None, d_mass: Tensor | None, mean: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Part]:
    """What every block's backward needs: (d_mean, delta, (mean, mass)), all wide and contiguous."""
    total = mean.to(mass.dtype), mass
    d_mean = torch.zeros_like(total[0]) if d_mean is None else d_mean.to(mass.dtype).contiguous()
    delta = (d_mean * total[0]).sum(-1)
    return d_mean, delta if d_mass is None else delta - d_mass, total
