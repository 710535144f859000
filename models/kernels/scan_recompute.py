"""Computes the chunks of a scan in groups, and recomputes them in backward to save memory.

The effect of a chunk on a state depends on that chunk alone, so a row is processed in groups of
chunks that fit a cache. Nothing inside a group is kept for the backward pass: with 8 heads of 64
that is a third to a fifth of the memory for a quarter more processor time, and no temporary is as
long as the row.

Letters: B rows, N chunks, C slots, D key width, E value width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.scan_chunkwise import AffineChunks, affine_chunks

# Elements of the largest tensor of a group, by device.
ROOM = {
    "cpu": 1 << 18,
    "meta": 1 << 18,
    "cuda": 1 << 24,
}


def recomputed_chunks(
    query: Tensor, payload: tuple[Tensor, ...], *, before: bool, room: int | None = None
) -> AffineChunks:
    """As `affine_chunks`, exactly.

    Args:
        room: elements that the largest tensor of a group may have; by default the value in ROOM for
            the device.
    """
    if room is None:
        room = ROOM.get(query.device.type, ROOM["cuda"])
    key_width = query.shape[4]
    rows, _, _, slots, value_width = payload[1].shape
    heads = max(tensor.shape[2] for tensor in (query, *payload))
    chunk_elements = rows * heads * slots * max(slots, value_width, key_width)
    group = max(1, room // chunk_elements)
    return AffineChunks(*_InGroups.apply(before, group, query, *payload))


class _InGroups(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, before: bool, group: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.before = before
        ctx.group = group
        ctx.save_for_backward(*inputs)
        count = inputs[2].shape[1]
        results: list[Tensor] = []
        for start in range(0, count, group):
            query, *payload = _chunks(inputs, start, group)
            parts = affine_chunks(query, tuple(payload), before=before)
            if not results:
                for part in parts:
                    results.append(part.new_empty(part.shape[0], count, *part.shape[2:]))
            for whole, part in zip(results, parts, strict=True):
                whole[:, start : start + group] = part
        if not any(ctx.needs_input_grad[3:]):
            # keep and gain depend on the payload alone: without its gradient they have none.
            summary = AffineChunks(*results)
            ctx.mark_non_differentiable(summary.keep, summary.gain)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        inputs: tuple[Tensor, ...] = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        d_inputs: list[Tensor | None] = []
        for tensor, is_needed in zip(inputs, needed, strict=True):
            d_inputs.append(torch.empty_like(tensor) if is_needed else None)
        for start in range(0, inputs[2].shape[1], ctx.group):
            leaves = []
            for tensor, is_needed in zip(_chunks(inputs, start, ctx.group), needed, strict=True):
                leaves.append(tensor.detach().requires_grad_(is_needed))
            with torch.enable_grad():
                outputs = affine_chunks(leaves[0], tuple(leaves[1:]), before=ctx.before)
            # An output without inputs that need gradients is no part of the graph.
            connected = []
            d_connected = []
            d_outputs = _chunks(grads, start, ctx.group)
            for output, d_output in zip(outputs, d_outputs, strict=True):
                if output.requires_grad:
                    connected.append(output)
                    d_connected.append(d_output)
            differentiated = [leaf for leaf in leaves if leaf.requires_grad]
            gradients = torch.autograd.grad(
                connected, differentiated, d_connected, allow_unused=True
            )
            wholes = [whole for whole in d_inputs if whole is not None]
            for whole, gradient in zip(wholes, gradients, strict=True):
                whole[:, start : start + ctx.group] = 0 if gradient is None else gradient
        return None, None, *d_inputs


def _chunks(tensors: tuple[Tensor, ...], start: int, size: int) -> list[Tensor]:
    return [tensor[:, start : start + size] for tensor in tensors]
