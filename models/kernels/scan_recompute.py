"""Computes the chunks of a scan in groups, and recomputes them in backward to save memory.

The effect of a chunk on a state depends on that chunk alone, so a row is processed in groups of
chunks that fit a cache. Nothing inside a group is kept for the backward pass: with 8 heads of 64
that is a third to a fifth of the memory for a quarter more processor time, and no temporary is as
long as the row.

Letters: B rows, N chunks, C slots, D key width, E value width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.scan_chunkwise import (
    AffineChunks,
    affine_chunks,
    chunk_reads,
    chunk_summary,
)

# Elements of the largest tensor of a group, by device.
ROOM = {
    "cpu": 1 << 18,
    "meta": 1 << 18,
    "cuda": 1 << 24,
}


SUMMARY = 2  # of AffineChunks: keep and gain depend on the payload alone


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
    group = _group(room, (query, *payload))

    def compute(query: Tensor, *payload: Tensor) -> tuple[Tensor, ...]:
        return affine_chunks(query, payload, before=before)

    return AffineChunks(*_InGroups.apply(compute, group, SUMMARY, query, *payload))


def recomputed_summary(payload: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """As `chunk_summary`, exactly."""

    def compute(*payload: Tensor) -> tuple[Tensor, ...]:
        return chunk_summary(payload)

    return _InGroups.apply(compute, _default_group(payload), 0, *payload)


def recomputed_reads(
    query: Tensor, payload: tuple[Tensor, ...], *, before: bool
) -> tuple[Tensor, Tensor]:
    """As `chunk_reads`, exactly."""

    def compute(query: Tensor, *payload: Tensor) -> tuple[Tensor, ...]:
        return chunk_reads(query, payload, before=before)

    return _InGroups.apply(compute, _default_group((query, *payload)), 0, query, *payload)


def _default_group(tensors: tuple[Tensor, ...]) -> int:
    return _group(ROOM.get(tensors[0].device.type, ROOM["cuda"]), tensors)


def _group(room: int, tensors: tuple[Tensor, ...]) -> int:
    """Returns the number of chunks whose largest tensor, [B, h, C, D], E or C, fits the room."""
    wide = [tensor for tensor in tensors if tensor.dim() == 5]
    rows, _, _, slots, _ = wide[0].shape
    heads = max(tensor.shape[2] for tensor in tensors)
    width = max(slots, *(tensor.shape[4] for tensor in wide))
    return max(1, room // (rows * heads * slots * width))


class _InGroups(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[..., tuple[Tensor, ...]],
        group: int,
        summary: int,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        """The last `summary` results do not depend on the first input."""
        ctx.compute = compute
        ctx.group = group
        ctx.save_for_backward(*inputs)
        count = inputs[0].shape[1]
        results: list[Tensor] = []
        for start in range(0, count, group):
            parts = compute(*_chunks(inputs, start, group))
            if not results:
                for part in parts:
                    results.append(part.new_empty(part.shape[0], count, *part.shape[2:]))
            for whole, part in zip(results, parts, strict=True):
                whole[:, start : start + group] = part
        if summary and not any(ctx.needs_input_grad[4:]):
            # Without the gradients of the other inputs they have none.
            ctx.mark_non_differentiable(*results[-summary:])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        inputs: tuple[Tensor, ...] = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        d_inputs: list[Tensor | None] = []
        for tensor, is_needed in zip(inputs, needed, strict=True):
            d_inputs.append(torch.empty_like(tensor) if is_needed else None)
        for start in range(0, inputs[0].shape[1], ctx.group):
            leaves = []
            for tensor, is_needed in zip(_chunks(inputs, start, ctx.group), needed, strict=True):
                leaves.append(tensor.detach().requires_grad_(is_needed))
            with torch.enable_grad():
                outputs = ctx.compute(*leaves)
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
        return None, None, None, *d_inputs


def _chunks(tensors: tuple[Tensor, ...], start: int, size: int) -> list[Tensor]:
    return [tensor[:, start : start + size] for tensor in tensors]
