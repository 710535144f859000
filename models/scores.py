"""Scores: the scale of the logits, and everything applied to them before the softmax.

A score owns no parameter: learned tables and sinks belong to the layer, which passes them as
`params`. A score states for each tensor which dim counts heads (None: the tensor is the same for
all heads), so that a driver may give a rank a part of the heads; `heads` are then their global
numbers. Wrapped scores combine a soft cap, a sink or shared values with every position scheme.

Letters: B rows, T queries, S keys, H query heads, G key heads, D key width, E value width.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.masks.algebra import Mask
from models.span import Span

Tensors = Sequence[Tensor]


class PairBlocks(NamedTuple):
    """N blocks of t query rows and s key rows; a query row is in one block at most.

    Attributes:
        queries: [N, t] numbers of rows among B x T x H.
        keys: [N, s] numbers of rows among B x S x G.
        seen: [N, t or 1, s] 1 where a query sees a key, else 0, as wide as sums; None for 1.
        add: [N, t, s] to add to the logits, or None.
        real: [N, t] bool, False at rows that only fill a block; None where all are real.
    """

    queries: Tensor
    keys: Tensor
    seen: Tensor | None
    add: Tensor | None = None
    real: Tensor | None = None


class Score:
    """Scaled dot product (Vaswani et al. 2017, arXiv:1706.03762); query (q,), payload (k, v).

    Attributes:
        query_heads, payload_heads, param_heads: for each tensor of the tuple, the dim that counts
            heads, or None.
        plain: the logits are exactly `scale * q k` plus `bias`, so a kernel that supports only
            these may compute them.
        biased: `bias` returns a tensor, which a kernel must then store for a whole block.
        two_sided: some params serve only keys later than their query; useless under a causal mask.
        one_sided: later keys all count as distance 0; their order is lost without a causal mask.
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
        """The factor of the dot products; 1 / sqrt(D) unless another was given."""
        if self._scale is not None:
            return self._scale
        return q.shape[-1] ** -0.5

    def operands(
        self, query: Tensors, payload: Tensors, params: Tensors
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes what a fast kernel takes, token by token and differentiable.

        Returns:
            q [B, T, H, D], k [B, S, G, D], v [B, S, G, E], with G dividing H.
        """
        return query[0], payload[0], payload[1]

    def bias(self, span: Span, kv_span: Span, heads: Tensor, dtype: torch.dtype) -> Tensor | None:
        """[B or 1, H or 1, T, S], added to the scaled logits and free of parameters, or None."""
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
        if bias is None:
            return logits
        return logits + bias

    def pairs(
        self,
        mask: Mask,
        query: Tensors,
        payload: Tensors,
        span: Span,
        kv_span: Span,
        *,
        heads: Tensor,
        most: int,
    ) -> Iterator[PairBlocks] | None:
        """Names the pairs that are seen, where the score knows them without computing logits.

        Of a named pair the logit is `scale * q k`, of the operands, plus what its block adds.

        Args:
            mask: that of the attention; a score names the pairs of the masks that it knows.
            heads: [H] global numbers.
            most: scores to yield at a time.

        Returns:
            Blocks that hold every pair once; None where the score cannot name them.
        """
        return None

    def pair_counter(self) -> Callable[[Span], int] | None:
        """Returns what counts the pairs of a head that `pairs` names in rows of tokens, for FLOPs.

        None where all pairs count that the mask shows. Counters of equal counts are equal.
        """
        return None

    def sink(self, params: Tensors) -> Tensor | None:
        """[H] logits of a key without a value that every query sees, or None."""
        return None


def grouped_dot_products(q: Tensor, k: Tensor) -> Tensor:
    """Products of q [B, T, H, D] with k [B, S, G, D], [B, H, T, S].

    Query head h reads key head h // (H / G).
    """
    key_heads = k.shape[2]
    queries_per_key = q.shape[2] // key_heads
    # queries are grouped, not keys repeated: no copy of the keys for every query head
    grouped_query = q.unflatten(2, (key_heads, queries_per_key))
    logits = torch.einsum("btgrd,bsgd->bgrts", grouped_query, k)
    return logits.flatten(1, 2)


class WrappedScore(Score):
    """Passes everything to an inner score; base of scores that change one thing about it."""

    def __init__(self, inner: Score):
        super().__init__()
        self.inner = inner
        # copied, because kernels and drivers read these from the outermost score
        self.plain = inner.plain
        self.biased = inner.biased
        self.query_heads = inner.query_heads
        self.payload_heads = inner.payload_heads
        self.param_heads = inner.param_heads
        self.two_sided = inner.two_sided
        self.one_sided = inner.one_sided

    def scale(self, q: Tensor) -> float:
        """See Score.scale."""
        return self.inner.scale(q)

    def operands(
        self, query: Tensors, payload: Tensors, params: Tensors
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Score.operands."""
        return self.inner.operands(query, payload, params)

    def bias(self, span: Span, kv_span: Span, heads: Tensor, dtype: torch.dtype) -> Tensor | None:
        """See Score.bias."""
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
        """See Score.logits."""
        return self.inner.logits(query, payload, params, span, kv_span, heads)

    def sink(self, params: Tensors) -> Tensor | None:
        """See Score.sink."""
        return self.inner.sink(params)


class SoftcapScore(WrappedScore):
    """Bends logits smoothly into (-cap, cap): cap tanh(logits / cap).

    The cap applies to everything the inner score gives, a position's bias included, and comes
    before the mask.

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
        """See Score.logits."""
        logits = self.inner.logits(query, payload, params, span, kv_span, heads)
        return (logits / self.cap).tanh() * self.cap


class SinkScore(WrappedScore):
    """Adds a key without a value that every query sees; its logits [H] are the last param."""

    def __init__(self, inner: Score):
        super().__init__(inner)
        self.param_heads = (*inner.param_heads, 0)

    def operands(
        self, query: Tensors, payload: Tensors, params: Tensors
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Score.operands."""
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
        """See Score.logits."""
        return self.inner.logits(query, payload, params[:-1], span, kv_span, heads)

    def sink(self, params: Tensors) -> Tensor | None:
        """See Score.sink."""
        return params[-1]


class SharedValueScore(WrappedScore):
    """Lets values have fewer heads than keys: v [B, S, G', E], with G' dividing G.

    They travel with G' heads and are repeated where they are used.
    """

    def operands(
        self, query: Tensors, payload: Tensors, params: Tensors
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Score.operands."""
        q, k, v = self.inner.operands(query, payload, params)
        repeats = k.shape[2] // v.shape[2]
        return q, k, v.repeat_interleave(repeats, 2)
