"""Attention over a plan: block after block, forward into one (mean, mass), backward into gradients.

A ring calls these once for every rank whose keys arrive, into the same accumulators; one device
calls them once.

Letters: B rows, T queries, S keys, H heads, E value width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.kernels import nonfinite, reference
from models.kernels.backends import select_kernel
from models.kernels.block_plan import (
    CAUSAL_TILE,
    FULL_TILE,
    LEAF,
    PARTIAL_TILE,
    Tile,
    plan_rows,
    split_tile,
)
from models.masks.algebra import Mask, visible
from models.scores import Score, Tensors
from models.span import Span


@dataclass(frozen=True)
class AttentionSpec:
    """What is computed: a score under a mask, for these (global) heads; `general` insists on the
    general tile."""

    score: Score
    mask: Mask
    heads: Tensor
    general: bool = False


def merge_partials(a: reference.Partial, b: reference.Partial) -> reference.Partial:
    """Join two partial attentions over disjoint keys into one over their union.

    Args:
        a, b: mean [B, T, H, E] and mass [B, T, H] in nats; minus infinity where no key was seen.

    Returns:
        The same pair for the union; associative and commutative up to rounding. Nothing and nothing
        is nothing, never NaN.

    Source: Milakov & Gimelshein 2018 (arXiv:1805.02867). Ours keeps the log of the sum, theirs the
    maximum and the sum.
    """
    lse = torch.logaddexp(a[1], b[1])
    share = (b[1] - reference.finite_lse(lse)).exp()
    return torch.lerp(a[0], b[0], share[..., None]), lse


def empty_partial(query: Tensors, heads: int, width: int) -> reference.Partial:
    """The attention over no keys: mean 0 [B, T, H, E], mass minus infinity [B, T, H]."""
    shape = (*query[0].shape[:2], heads)
    dtype = reference.accumulation_dtype(query[0].dtype)
    mean = query[0].new_zeros(*shape, width, dtype=dtype)
    return mean, query[0].new_full(shape, -torch.inf, dtype=dtype)


def _rows(block: Tile) -> tuple[slice, slice]:
    return slice(block.r0, block.r1), slice(block.q0, block.q1)


def _keys(block: Tile) -> tuple[slice, slice]:
    return slice(block.r0, block.r1), slice(block.k0, block.k1)


def _add(
    what: AttentionSpec, block: Tile, span: Span, kv_span: Span, dtype: torch.dtype
) -> tuple[bool, Tensor | None]:
    """How a kernel is told what the block's queries see: its own causal flag, or a matrix to add to
    the scores.

    The matrix is wide where it carries numbers; where it only hides keys it has the dtype of the
    queries, which is exact.
    """
    here = span.map(lambda t: t[_rows(block)])
    there = kv_span.map(lambda t: t[_keys(block)])
    bias = what.score.bias(here, there, what.heads, reference.accumulation_dtype(dtype))
    if block.kind != PARTIAL_TILE and bias is None:
        return block.kind == CAUSAL_TILE, None
    seen = visible(what.mask, here, there, what.heads)
    bias = torch.zeros((), dtype=dtype, device=seen.device) if bias is None else bias
    return False, torch.where(seen, bias, -torch.inf)


def _mask(what: AttentionSpec, block: Tile) -> Mask | None:
    """What the general tile has to look at: nothing where every query of a block sees every key."""
    return None if block.kind == FULL_TILE else what.mask


def _side(what: AttentionSpec) -> int | None:
    """Blocks that only need the kernel's own flags may be of any size."""
    return LEAF if what.score.biased else None


def _take(total: reference.Partial, rows: tuple[slice, slice], part: reference.Partial) -> None:
    """`merge` of these rows of `total` with a part, in place."""
    mean = total[0][rows]
    lse = total[1][rows]
    joint = torch.logaddexp(lse, part[1])
    mean.lerp_(part[0], (part[1] - reference.finite_lse(joint)).exp_()[..., None])
    lse.copy_(joint)


def _parts(
    what: AttentionSpec, span: Span, kv_span: Span, kernel: Any, tensors: Sequence[Tensor]
) -> Iterator[tuple[Any, Tile]]:
    """(who computes it, block) for all blocks; blocks that hide something go to `careful` where not
    all is finite."""
    blocks = plan_rows(what.mask, span, kv_span)
    doubtful = any(block.kind != FULL_TILE for block in blocks) and not nonfinite.all_finite(
        tensors
    )
    side = reference.TILE_SIDE if kernel is None else _side(what)
    for block in blocks:
        if doubtful and block.kind != FULL_TILE:
            yield from ((nonfinite, part) for part in split_tile(block, reference.TILE_SIDE))
        elif side is None:
            yield kernel, block
        else:
            yield from ((kernel or reference, part) for part in split_tile(block, side))


def forward(
    what: AttentionSpec,
    query: Tensors,
    payload: Tensors,
    params: Tensors,
    span: Span,
    kv_span: Span,
    total: reference.Partial,
) -> None:
    """Attend to these keys too: `total` is changed in place."""
    kernel = None if what.general else select_kernel(query[0].device, query[0].dtype, what.score)
    operands = what.score.operands(query, payload, params) if kernel else None
    for who, block in _parts(what, span, kv_span, kernel, (*query, *payload)):
        rows = _rows(block)
        keys = _keys(block)
        if kernel and operands and who is kernel:
            q = operands[0][rows]
            k = operands[1][keys]
            v = operands[2][keys]
            flag, add = _add(what, block, span, kv_span, q.dtype)
            part = kernel.forward(q, k, v, what.score.scale(q), flag, add)
        else:
            spans = span.map(lambda t, r=rows: t[r]), kv_span.map(lambda t, r=keys: t[r])
            some = [t[rows] for t in query], [t[keys] for t in payload]
            part = who.forward(what.score, _mask(what, block), *some, params, *spans, what.heads)
        _take(total, rows, part)


@dataclass
class Gradients:
    """Wide sums of the gradients of (*query, *payload, *params)."""

    query: list[Tensor]
    payload: list[Tensor]
    params: list[Tensor]

    @staticmethod
    def zeros(query: Tensors, payload: Tensors, params: Tensors) -> "Gradients":
        def blanks(some: Tensors) -> list[Tensor]:
            return [
                torch.zeros_like(
                    t,
                    dtype=reference.accumulation_dtype(t.dtype),
                    memory_format=torch.contiguous_format,
                )
                for t in some
            ]

        return Gradients(blanks(query), blanks(payload), blanks(params))


def backward(
    what: AttentionSpec,
    query: Tensors,
    payload: Tensors,
    params: Tensors,
    span: Span,
    kv_span: Span,
    *,
    d_out: Tensor,
    total: reference.Partial,
    delta: Tensor,
    into: Gradients,
) -> None:
    """Add what these keys contribute to every gradient; `total` is (mean, mass) over ALL keys."""
    kernel = None if what.general else select_kernel(query[0].device, query[0].dtype, what.score)
    operands = _Operands(what, query, payload, params, into) if kernel else None
    for who, block in _parts(what, span, kv_span, kernel, (*query, *payload, d_out, delta)):
        rows = _rows(block)
        keys = _keys(block)
        if kernel and operands and who is kernel:
            (q, k, v), sums = operands.of(rows, keys)
            flag, add = _add(what, block, span, kv_span, q.dtype)
            grads = kernel.backward(
                q,
                k,
                v,
                what.score.scale(q),
                flag,
                add,
                d_out=d_out[rows],
                mean=total[0][rows],
                lse=total[1][rows],
            )
        else:
            spans = span.map(lambda t, r=rows: t[r]), kv_span.map(lambda t, r=keys: t[r])
            some = [t[rows] for t in query], [t[keys] for t in payload], params
            grads = who.backward(
                what.score,
                _mask(what, block),
                *some,
                *spans,
                what.heads,
                d_out=d_out[rows],
                lse=total[1][rows],
                delta=delta[rows],
            )
            sums = (
                [t[rows] for t in into.query] + [t[keys] for t in into.payload] + list(into.params)
            )
        for add_to, grad in zip(sums, grads, strict=True):
            if grad is not None:
                add_to += grad
    if operands:
        operands.close()


class _Operands:
    """q, k and v of a kernel's backward pass, the sums of their gradients, and the way from those
    to what they were made of."""

    def __init__(
        self,
        what: AttentionSpec,
        query: Tensors,
        payload: Tensors,
        params: Tensors,
        into: Gradients,
    ):
        self.leaves = [t.detach().requires_grad_() for t in (*query, *payload, *params)]
        queries = len(query)
        payloads = len(query) + len(payload)
        with torch.enable_grad():
            made = what.score.operands(
                self.leaves[:queries], self.leaves[queries:payloads], self.leaves[payloads:]
            )
        self.made = made
        self.every = [*into.query, *into.payload, *into.params]
        self.same = all(any(x is y for y in self.leaves) for x in made)
        self.operands = tuple(x.detach() for x in made)
        if self.same:  # the operands are the tensors themselves: add straight into their sums
            self.sums = [
                self.every[next(i for i, y in enumerate(self.leaves) if x is y)] for x in made
            ]
        else:
            dtype = reference.accumulation_dtype(made[0].dtype)
            self.sums = [
                torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
                for x in self.operands
            ]

    def of(
        self, rows: tuple[slice, slice], keys: tuple[slice, slice]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(q, k, v) of a block, and where their gradients are summed."""
        where = rows, keys, keys
        return [x[w] for x, w in zip(self.operands, where)], [
            x[w] for x, w in zip(self.sums, where)
        ]

    def close(self) -> None:
        """Carry the sums on to what the operands were made of."""
        if self.same:
            return
        wanted = [g.to(x.dtype) for g, x in zip(self.sums, self.made)]
        grads = torch.autograd.grad(self.made, self.leaves, wanted, allow_unused=True)
        for add_to, grad in zip(self.every, grads, strict=True):
            if grad is not None:
                add_to += grad
