"""Scores made of another score, so that a soft cap, a sink or shared values go with every position scheme.

Letters: B rows, T queries, S keys, H query heads, G key heads, E value width.
"""

import torch
from torch import Tensor

from models.scores import Score, Tensors
from models.span import Span


class Wrapped(Score):
    """Another score, unchanged; the parent of those that change one thing about it."""

    def __init__(self, inner: Score):
        super().__init__()
        self.inner, self.plain, self.biased = inner, inner.plain, inner.biased
        self.query_heads, self.payload_heads, self.param_heads = inner.query_heads, inner.payload_heads, inner.param_heads
        self.two_sided = inner.two_sided
        self.one_sided = inner.one_sided

    def scale(self, q: Tensor) -> float:
        return self.inner.scale(q)

    def operands(self, query: Tensors, payload: Tensors, params: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner.operands(query, payload, params)

    def bias(self, at: Span, of: Span, heads: Tensor, dtype: torch.dtype) -> Tensor | None:
        return self.inner.bias(at, of, heads, dtype)

    def logits(self, query: Tensors, payload: Tensors, params: Tensors, at: Span, of: Span, heads: Tensor) -> Tensor:
        return self.inner.logits(query, payload, params, at, of, heads)

    def sink(self, params: Tensors) -> Tensor | None:
        return self.inner.sink(params)


class Capped(Wrapped):
    """Logits bent smoothly into (-cap, cap): cap tanh(logits / cap).

    What is capped is everything that the inner score gives, a position's bias included; the mask comes after.
    Source: Gemma 2 (arXiv:2408.00118), Bello et al. 2016 (arXiv:1611.09940).
    """

    def __init__(self, inner: Score, cap: float):
        super().__init__(inner)
        self.cap, self.plain = cap, False

    def logits(self, query: Tensors, payload: Tensors, params: Tensors, at: Span, of: Span, heads: Tensor) -> Tensor:
        return (self.inner.logits(query, payload, params, at, of, heads) / self.cap).tanh() * self.cap


class Sunk(Wrapped):
    """With one more param, the last: [H] the logit of a key without a value, which every query sees."""

    def __init__(self, inner: Score):
        super().__init__(inner)
        self.param_heads = (*inner.param_heads, 0)

    def operands(self, query: Tensors, payload: Tensors, params: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner.operands(query, payload, params[:-1])

    def logits(self, query: Tensors, payload: Tensors, params: Tensors, at: Span, of: Span, heads: Tensor) -> Tensor:
        return self.inner.logits(query, payload, params[:-1], at, of, heads)

    def sink(self, params: Tensors) -> Tensor | None:
        return params[-1]


class SharedValues(Wrapped):
    """Values may have fewer heads than keys: v [B, S, G', E] with G' dividing G; they travel so and are repeated when used."""

    def operands(self, query: Tensors, payload: Tensors, params: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.inner.operands(query, payload, params)
        return q, k, v.repeat_interleave(k.shape[2] // v.shape[2], 2)
