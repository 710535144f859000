"""The chunks of a scan, worked out a stripe at a time, and once more in the backward pass: time for
memory.

What a chunk does to a state depends on that chunk alone, so a row is gone through in stripes of
chunks that fit a cache. Nothing of the inside of a stripe is kept for the backward pass: at 8 heads
of 64 that is a third to a fifth of the memory for a quarter more processor time, and no temporary
is as long as the row.

Letters: B rows, N chunks, C slots, D key width, E value width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.scan_chunkwise import AffineChunks, affine_chunks

ROOM = {
    "cpu": 1 << 18,
    "meta": 1 << 18,
    "cuda": 1 << 24,
}  # elements of the largest tensor of a stripe


def recomputed_chunks(
    query: Tensor, payload: tuple[Tensor, ...], *, before: bool, room: int | None = None
) -> AffineChunks:
    """As `affine`, exactly.

    Args:
        room: elements that the largest tensor of a stripe may have; by default what suits the
            device.
    """
    if room is None:
        room = ROOM.get(query.device.type, ROOM["cuda"])
    keys = query.shape
    values = payload[1].shape
    heads = max(x.shape[2] for x in (query, *payload))
    of_chunk = values[0] * heads * values[3] * max(values[3], values[4], keys[4])
    return AffineChunks(*_InStripes.apply(before, max(1, room // of_chunk), query, *payload))


class _InStripes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, before: bool, stripe: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.before = before
        ctx.stripe = stripe
        ctx.save_for_backward(*inputs)
        count = inputs[2].shape[1]
        found: list[Tensor] = []
        for start in range(0, count, stripe):
            query, *payload = _stripe(inputs, start, stripe)
            parts = affine_chunks(query, tuple(payload), before=before)
            found = found or [
                part.new_empty(part.shape[0], count, *part.shape[2:]) for part in parts
            ]
            for whole, part in zip(found, parts, strict=True):
                whole[:, start : start + stripe] = part
        if not any(
            ctx.needs_input_grad[3:]
        ):  # what becomes of a state depends on the payload alone: no gradient to send home
            summary = AffineChunks(*found)
            ctx.mark_non_differentiable(summary.keep, summary.gain)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        inputs: tuple[Tensor, ...] = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        found = [
            torch.empty_like(x) if want else None for x, want in zip(inputs, wanted, strict=True)
        ]
        for start in range(0, inputs[2].shape[1], ctx.stripe):
            part = _stripe(inputs, start, ctx.stripe)
            leaves = [x.detach().requires_grad_(want) for x, want in zip(part, wanted, strict=True)]
            with torch.enable_grad():
                outs = affine_chunks(leaves[0], tuple(leaves[1:]), before=ctx.before)
            told = [
                pair
                for pair in zip(outs, _stripe(grads, start, ctx.stripe), strict=True)
                if pair[0].requires_grad
            ]
            asked = [x for x in leaves if x.requires_grad]
            answers = torch.autograd.grad(
                [x for x, _ in told], asked, [x for _, x in told], allow_unused=True
            )
            for whole, answer in zip((x for x in found if x is not None), answers, strict=True):
                whole[:, start : start + ctx.stripe] = 0 if answer is None else answer
        return None, None, *found


def _stripe(tensors: tuple[Tensor, ...], start: int, size: int) -> list[Tensor]:
    return [x[:, start : start + size] for x in tensors]
