"""Decides which attentions our own Triton kernels serve, and hands them over.

They serve masks and scores that other kernels of a GPU need a stored matrix of pairs for, or cannot
compute: masks that are no bands, slopes or learned numbers by distance, soft caps, and an lse whose
gradient is used. Whatever has no program or no terms is left to what served it before.

Letters: B rows, T queries, S keys, H heads.
"""

from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from models.kernels.backends import PAIRWISE, give_up_pairwise, load_pairwise
from models.kernels.operands import Operands
from models.kernels.reference import Partial
from models.kernels.triton_attention.block_lists import needs_mask
from models.kernels.triton_attention.programs import Program, translate
from models.kernels.triton_attention.sizes import NARROWEST, widest
from models.kernels.triton_attention.terms import (
    NO_BIAS,
    Terms,
    add_table_gradient,
    translate_score,
)
from models.masks.algebra import Mask
from models.scores import Score, Tensors
from models.span import Span


class PairwiseAttention(NamedTuple):
    """An attention that the kernels compute.

    Attributes:
        module: of the kernels.
        mask: the plan of blocks is made of it.
        program: of the mask.
        terms: of the score.
        heads: [H] global numbers.
        params: of the score.
        span, kv_span: addresses of the queries and keys.
    """

    module: Any
    mask: Mask
    program: Program
    terms: Terms
    heads: Tensor
    params: Tensors
    span: Span
    kv_span: Span


def kernels_for(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Returns the module of the kernels; None where there is none for these numbers."""
    is_rocm = device.type == "cuda" and torch.version.hip is not None
    if is_rocm or (device.type, dtype) not in PAIRWISE:
        return None
    return load_pairwise()


def translated(mask: Mask, score: Score) -> tuple[Program, Terms] | None:
    """Returns a mask and a score as the kernels take them, or None."""
    program = translate(mask)
    terms = translate_score(score)
    return None if program is None or terms is None else (program, terms)


def wanted(general: bool, terms: Terms, mask: Mask, span: Span, kv_span: Span) -> bool:
    """Tells whether no other kernel serves without a matrix; a long decode has one query."""
    if span.shape[1] < NARROWEST or not kv_span.shape[1]:
        return False
    special = general or terms.bias != NO_BIAS or terms.cap > 0
    return special or needs_mask(mask, span, kv_span)


def has_numbers(tensors: Iterable[Tensor]) -> bool:
    """Returns whether kernels can be launched on tensors. A plan counts launches without them."""
    return not any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors)


def pairwise_attention(
    spec: Any, query: Tensors, payload: Tensors, params: Tensors, span: Span, kv_span: Span
) -> PairwiseAttention | None:
    """Returns the attention of a blockwise.AttentionSpec for the kernels; None where tiles serve.

    For attentions that are no bands.
    """
    module = kernels_for(query[0].device, query[0].dtype)
    parts = translated(spec.mask, spec.score) if module else None
    if module is None or parts is None:
        return None
    if not has_numbers((*query, *payload)):
        return None
    if not wanted(spec.general, parts[1], spec.mask, span, kv_span):
        return None
    return PairwiseAttention(module, spec.mask, *parts, spec.heads, params, span, kv_span)


def forward(
    work: PairwiseAttention, score: Score, query: Tensors, payload: Tensors, total: Partial
) -> bool:
    """Attends to these keys too: `total` is changed in place.

    A kernel that this card or version of Triton does not compile fails before it computes; the
    process then goes on without them, backward too.

    Returns:
        Whether it did: False also where heads are too wide.
    """
    operands = score.operands(query, payload, work.params)
    if _too_wide(operands):
        return False
    try:
        work.module.forward(work, operands, score.scale(operands[0]), total)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        give_up_pairwise(problem)
        return False
    return True


def backward(
    work: PairwiseAttention,
    score: Score,
    query: Tensors,
    payload: Tensors,
    *,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    into: Sequence[Sequence[Tensor]],
) -> bool:
    """Adds the contribution of these keys to the wide sums of (query, payload, params).

    Returns:
        Whether it did, as `forward`.
    """
    sums = [total for kind in into for total in kind]
    operands = Operands(score, query, payload, work.params, sums)
    if _too_wide(operands.operands):
        return False
    scale = score.scale(operands.operands[0])
    gradient = work.module.backward(
        work, operands.operands, operands.sums, scale, d_out=d_out, lse=lse, delta=delta
    )
    operands.close()
    if gradient is not None:
        add_table_gradient(work.terms, gradient, into[2])
    return True


def _too_wide(operands: Sequence[Tensor]) -> bool:
    return too_wide(operands[0].dtype, operands[0].shape[-1], operands[2].shape[-1])


def too_wide(dtype: torch.dtype, key_width: int, value_width: int) -> bool:
    """Tells whether heads are wider than the kernels take."""
    return max(key_width, value_width) > widest(dtype)
