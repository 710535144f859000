"""Scores: the scale of the logits, and everything added to or done with them before the softmax.

A score owns no parameter: tables, sinks and slopes that are learned belong to the layer, which
passes them as `params`. It says of each tensor which dim counts heads (None: the tensor is the same
for all heads), so that a driver may hand a rank some of the heads; `heads` are then their global
numbers. Wrapped scores let a soft cap, a sink or shared values go with every position scheme.

Letters: B rows, T queries, S keys, H query heads, G key heads, D key width, E value width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.span import Span

Tensors = Sequence[Tensor]


class Score:
    """Scaled dot product (Vaswani et al. 2017, arXiv:1706.03762); query (q,), payload (k, v).

    Attributes: query_heads, payload_heads, param_heads: for each tensor of the tuple, the dim that
        counts heads, or None. biased: `bias` gives something, which a kernel must then hold for a
        whole block at once. plain: the logits are exactly `scale * q k` plus `bias`, so that a
        kernel that knows only those may compute them. two_sided: some of the params serve only keys
        that come later than their query; useless under a causal mask. one_sided: keys that come
        later are all treated as one at distance 0; their order is lost without a causal mask.
    """

    query_heads: tuple[int | None, ...] = (2,)
    payload_heads: tuple[int | None, ...] = (2, 2)
    param_heads: tuple[int | None, ...] = ()
    plain = True
    biased = False
    two_sided = False
    one_sided = False

    def __init__(self, scale: float | None = None):
        self._scale = scale

    def scale(self, q: Tensor) -> float:
        """What the dot products are multiplied by; 1 / sqrt(D) unless the score was given
        another."""
        return q.shape[-1] ** -0.5 if self._scale is None else self._scale

    def operands(
        self, query: Tensors, payload: Tensors, params: Tensors
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, D], k [B, S, G, D], v [B, S, G, E] with G dividing H; per token and
        differentiable."""
        return query[0], payload[0], payload[1]

    def bias(self, span: Span, kv_span: Span, heads: Tensor, dtype: torch.dtype) -> Tensor | None:
        """[B or 1, H or 1, T, S] without parameters, added to the scaled logits; None where there
        is none."""
        return None

    def logits(
        self,
        query: Tensors,
        payload: Tensors,
        params: Tensors,
        span: Span,
        kv_span: Span,
        heads: Tensor,
    ) -> Tensor:
        """[B, H, T, S]: the general form, differentiable in every tensor. Masking comes later."""
        q, k, _ = self.operands(query, payload, params)
        logits = grouped_dot_products(q, k) * self.scale(q)
        bias = self.bias(span, kv_span, heads, logits.dtype)
        return logits if bias is None else logits + bias

    def sink(self, params: Tensors) -> Tensor | None:
        """[H] logit of a key that every query sees and that carries no value, or None."""
        return None


def grouped_dot_products(q: Tensor, k: Tensor) -> Tensor:
    """[B, H, T, S]: products of q [B, T, H, D] with k [B, S, G, D]; query head h reads key head h
    // (H / G)."""
    share = q.shape[2] // k.shape[2]
    logits = torch.einsum("btgrd,bsgd->bgrts", q.unflatten(2, (k.shape[2], share)), k)
    return logits.flatten(1, 2)


class WrappedScore(Score):
    """Another score, unchanged; the parent of those that change one thing about it."""

    def __init__(self, inner: Score):
        super().__init__()
        self.inner = inner
        self.plain = inner.plain
        self.biased = inner.biased
        self.query_heads = inner.query_heads
        self.payload_heads = inner.payload_heads
        self.param_heads = inner.param_heads
        self.two_sided = inner.two_sided
        self.one_sided = inner.one_sided

    def scale(self, q: Tensor) -> float:
        return self.inner.scale(q)

    def operands(
        self, query: Tensors, payload: Tensors, params: Tensors
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner.operands(query, payload, params)

    def bias(self, span: Span, kv_span: Span, heads: Tensor, dtype: torch.dtype) -> Tensor | None:
        return self.inner.bias(span, kv_span, heads, dtype)

    def logits(
        self,
        query: Tensors,
        payload: Tensors,
        params: Tensors,
        span: Span,
        kv_span: Span,
        heads: Tensor,
    ) -> Tensor:
        return self.inner.logits(query, payload, params, span, kv_span, heads)

    def sink(self, params: Tensors) -> Tensor | None:
        return self.inner.sink(params)


class SoftcapScore(WrappedScore):
    """Logits bent smoothly into (-cap, cap): cap tanh(logits / cap).

    What is capped is everything that the inner score gives, a position's bias included; the mask
    comes after.
    Source: Gemma 2 (arXiv:2408.00118), Bello et al. 2016 (arXiv:1611.09940).
    """

    def __init__(self, inner: Score, cap: float):
        super().__init__(inner)
        self.cap = cap
        self.plain = False

    def logits(
        self,
        query: Tensors,
        payload: Tensors,
        params: Tensors,
        span: Span,
        kv_span: Span,
        heads: Tensor,
    ) -> Tensor:
        return (
            self.inner.logits(query, payload, params, span, kv_span, heads) / self.cap
        ).tanh() * self.cap


class SinkScore(WrappedScore):
    """With one more param, the last: [H] the logit of a key without a value, which every query
    sees."""

    def __init__(self, inner: Score):
        super().__init__(inner)
        self.param_heads = (*inner.param_heads, 0)

    def operands(
        self, query: Tensors, payload: Tensors, params: Tensors
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner.operands(query, payload, params[:-1])

    def logits(
        self,
        query: Tensors,
        payload: Tensors,
        params: Tensors,
        span: Span,
        kv_span: Span,
        heads: Tensor,
    ) -> Tensor:
        return self.inner.logits(query, payload, params[:-1], span, kv_span, heads)

    def sink(self, params: Tensors) -> Tensor | None:
        return params[-1]


class SharedValueScore(WrappedScore):
    """Values may have fewer heads than keys: v [B, S, G', E] with G' dividing G; they travel so and
    are repeated when used."""

    def operands(
        self, query: Tensors, payload: Tensors, params: Tensors
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.inner.operands(query, payload, params)
        return q, k, v.repeat_interleave(k.shape[2] // v.shape[2], 2)
