"""Attention over chosen pairs: blocks of queries and keys that a score names beforehand.

Where a score knows which keys a query can see without looking at the others (equal hashes, chosen
blocks), the rows of queries and keys are gathered into small blocks and computed together, many
blocks at a time. Cost and memory follow what was chosen, not the length of the row.

Letters: B rows, T queries, S keys, H query heads, G key heads, D key width, E value width, N blocks
computed together, t queries of a block, s keys of a block.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from models.kernels.nonfinite import all_finite
from models.kernels.pairs import readings
from models.kernels.reference import Partial, accumulation_dtype, finite_lse
from models.kernels.workspace import Workspace
from models.scores import PairBlocks, Tensors
from models.span import Span

HIDDEN = 1e30  # how far below others the logit of a key is that is not seen


def chosen_blocks(
    spec: Any, query: Tensors, payload: Tensors, span: Span, kv_span: Span, doubtful: Tensors = ()
) -> Iterator[PairBlocks] | None:
    """Returns the blocks that the score of a blockwise.AttentionSpec names.

    None where it names none and the tiles of the mask serve: the gradient of the lse is wanted,
    one token is decoded, some number on a CPU is not finite (see nonfinite.py), or the tensors hold
    no numbers, as in estimates.

    Args:
        doubtful: more tensors of the pass that may hold numbers that are not finite.
    """
    tensors = (*query, *payload, *doubtful)
    if spec.general or span.shape[1] == 1 or not kv_span.shape[1]:
        return None
    if not readings.has_numbers(tensors):
        return None
    most = readings.scores_together(query[0].device)
    blocks = spec.score.pairs(spec.mask, query, payload, span, kv_span, heads=spec.heads, most=most)
    # On a GPU the look would wait for the device; see nonfinite.py.
    if blocks is None or (tensors[0].is_cpu and not all_finite(tensors)):
        return None
    return blocks


def forward(blocks: Iterator[PairBlocks], operands: Tensors, scale: float, total: Partial) -> None:
    """Attends to the pairs of all blocks: `total` is changed in place.

    Args:
        operands: q [B, T, H, D], k [B, S, G, D] and v [B, S, G, E]; k and v may be one tensor.
        scale: factor of the dot products.
        total: (mean [B, T, H, E], lse [B, T, H]) over the keys so far.
    """
    work = Workspace(total[0].device)
    rows = _Rows(operands, scale, work)
    mean = total[0].view(-1, total[0].shape[-1])
    lse = total[1].view(-1)
    for block in blocks:
        query, key, value = rows.of(block)
        logits = _hidden(_logits(query, key, block, work), block)
        highest = logits.amax(-1, keepdim=True)
        weight = _weights(logits, highest, block)
        mass = weight.sum(-1, keepdim=True)
        part_lse = (mass.log() + highest).flatten()
        part_mean = (
            work.product("mean", weight, value).div_(torch.where(mass > 0, mass, 1)).flatten(0, 1)
        )
        index = block.queries.flatten()
        if block.real is not None:
            kept = block.real.flatten().nonzero()[:, 0]
            index = index[kept]
            part_lse = part_lse[kept]
            part_mean = part_mean[kept]
        merged = torch.logaddexp(lse.index_select(0, index), part_lse)
        share = (part_lse - finite_lse(merged)).exp_()
        mean.index_copy_(0, index, mean.index_select(0, index).lerp_(part_mean, share[:, None]))
        lse.index_copy_(0, index, merged)


def backward(
    blocks: Iterator[PairBlocks],
    made: Any,
    scale: float,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
) -> None:
    """Adds the contribution of the pairs of all blocks to the sums of the gradients of operands.

    Args:
        made: `operands` as in `forward`, and `sums`, the wide sums of their gradients.
        scale: factor of the dot products.
        d_out, lse, delta: as in reference.backward, over all keys.
    """
    work = Workspace(lse.device)
    rows = _Rows(made.operands, scale, work)
    d_outs = d_out.reshape(-1, d_out.shape[-1])
    all_lse = finite_lse(lse).reshape(-1)
    all_delta = delta.reshape(-1)
    sums = [tensor.view(-1, tensor.shape[-1]) for tensor in made.sums]
    for block in blocks:
        query, key, value = rows.of(block)
        index = block.queries.flatten()
        key_index = block.keys.flatten().long()  # index_add_ takes twice as long with int32
        d_mean = work.gather("d_mean", d_outs, block.queries, rows.dtype)
        own_lse = all_lse.index_select(0, index).view(*block.queries.shape, 1)
        own_delta = all_delta.index_select(0, index).view(*block.queries.shape, 1)
        both = None
        if rows.shared:
            # One product gives logits and d_weight, one the gradient as key and as value.
            left = _joined(work, query, d_mean)
            both = work.product("logits", left, key.transpose(1, 2))
            logits, d_logits = both.chunk(2, 1)
            if block.add is not None:
                logits += block.add
        else:
            logits = _logits(query, key, block, work)
            d_logits = work.product("d_logits", d_mean, value.transpose(1, 2))
        weight = _weights(logits, own_lse, block)
        d_logits.sub_(own_delta).mul_(weight)
        d_query = work.product("d_query", d_logits, key).mul_(scale)
        sums[0].index_add_(0, index, d_query.flatten(0, 1))
        if both is not None:
            left = _joined(work, d_mean, query)
            d_key = work.product("d_key", both.transpose(1, 2), left)
            sums[1].index_add_(0, key_index, d_key.flatten(0, 1))
        else:
            d_key = work.product("d_key", d_logits.transpose(1, 2), query)
            d_value = work.product("d_value", weight.transpose(1, 2), d_mean)
            sums[1].index_add_(0, key_index, d_key.flatten(0, 1))
            sums[2].index_add_(0, key_index, d_value.flatten(0, 1))


def _joined(work: Workspace, first: Tensor, second: Tensor) -> Tensor:
    """[N, t, D] twice -> [N, 2 t, D]."""
    count, rows, width = first.shape
    return torch.cat(
        [first, second], 1, out=work.take("joined", (count, 2 * rows, width), first.dtype)
    )


def _logits(query: Tensor, key: Tensor, block: PairBlocks, work: Workspace) -> Tensor:
    """[N, t, s] of scaled queries and keys."""
    logits = work.product("logits", query, key.transpose(1, 2))
    if block.add is not None:
        logits += block.add
    return logits


def _hidden(logits: Tensor, block: PairBlocks) -> Tensor:
    """Makes the logits of keys that are not seen very low, and leaves them finite; in place."""
    if block.seen is None:
        return logits
    return logits.add_(block.seen - 1, alpha=HIDDEN)


def _weights(logits: Tensor, less: Tensor, block: PairBlocks) -> Tensor:
    """exp(logits - less), and 0 where a key is not seen; in the memory of the logits.

    `exp` takes twenty times as long where its result is 0 or no normal number, hence the lower
    bound: it leaves weights that are below a normal number 0 but for a normal number's smallest.
    Weights are at most 1 but for rounding; the upper bound keeps those finite that are not seen.
    """
    lowest = math.log(torch.finfo(logits.dtype).tiny) + 1
    weight = logits.sub_(less).clamp_(lowest, 1).exp_()
    return weight if block.seen is None else weight.mul_(block.seen)


class _Rows:
    """Gathers rows of q, k and v, wide and with the query scaled, into a workspace."""

    def __init__(self, operands: Tensors, scale: float, work: Workspace):
        query, key, value = operands
        self.dtype = accumulation_dtype(query.dtype)
        self.scale = scale
        self.work = work
        self.shared = _same(key, value)
        self.query = query.reshape(-1, query.shape[-1])
        self.key = key.reshape(-1, key.shape[-1])
        self.value = self.key if self.shared else value.reshape(-1, value.shape[-1])

    def of(self, block: PairBlocks) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (scaled query [N, t, D], key [N, s, D], value [N, s, E])."""
        gather = self.work.gather
        query = gather("query", self.query, block.queries, self.dtype).mul_(self.scale)
        key = gather("key", self.key, block.keys, self.dtype)
        value = key if self.shared else gather("value", self.value, block.keys, self.dtype)
        return query, key, value


def _same(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors are one in memory."""
    # by storage, not by address: tensors of a plan have none
    alike = a.shape == b.shape and a.stride() == b.stride()
    begin = a.storage_offset() == b.storage_offset()
    return alike and begin and a.untyped_storage()._cdata == b.untyped_storage()._cdata
