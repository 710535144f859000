"""Bytes of training state and activations on one device, counted on the meta device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.cost.flops import CostTrace, trace_cost
from models.cost.parameters import BYTES, DTYPES, meta_batch, meta_twin
from models.declared import declared
from models.primitives.softmax import Softmax


def state_bytes(model: nn.Module, precision: str = "float32", shards: int = 1) -> dict[str, int]:
    """Bytes that stay on one device from step to step: parameters, gradients, optimiser (AdamW).

    Args:
        precision: bfloat16 keeps float32 parameters, gradients and moments, and computes with
            2-byte copies beside them.
        shards: among how many devices the state is divided; 1 = whole on each.

    The copies are counted whole when shards is 1; sharded engines gather them block by block, the
    largest block counts.
    """
    stored = sum(-(-p.numel() // shards) for p in model.parameters()) * max(4, BYTES[precision])
    gathered = sum(p.numel() for p in model.parameters())
    if shards > 1:
        blocks = [
            sum(p.numel() for p in block.parameters())
            for block in declared(model, "blocks", nn.ModuleList, ())
        ]
        gathered = gathered - sum(blocks) + max(blocks, default=0)
    copies = gathered * BYTES[precision] if precision == "bfloat16" or shards > 1 else 0
    return {"parameters": stored, "copies": copies, "gradients": stored, "optimiser": 2 * stored}


def activation_bytes(
    model: nn.Module,
    tokens: int,
    precision: str = "float32",
    checkpointing: str = "none",
    offload: bool = False,
) -> int:
    """Most bytes that autograd keeps of `tokens` tokens of one row on one device, of a forward and
    its backward.

    Counted on the meta device from what each operation saves, with the losses. Measured on the CPU,
    by every storage that lives (tests/parallel/test_activation_memory.py): between forward and
    backward decoders of attention and SwiGLU hold within 1% of it, other layers within 10%. What
    operations need while they run comes on top: at most 15% in decoders of attention and SwiGLU
    whose scores are plain; general scores, chunks of scans, other devices' kernels and the exchange
    may need more.

    Args:
        tokens: on the device at once: of a row over ranks those of a rank, of a row cut in time
            (parallel.time) those of a piece. What pieces leave to each other comes on top.
        checkpointing: none; full = the inputs of all blocks, and of the largest one its inside,
            which is computed again, and a gradient; selective = the mean and mass of every
            attention too.
        offload: what blocks save waits on the host (`host_bytes`): of the blocks the inside of the
            largest one counts. That is a bound where nothing is computed again: what comes back is
            dropped as soon as it was used.

    Raises:
        ValueError: another checkpointing, or one of a model that has no blocks to compute again or
            to offload.
    """
    _validate(model, checkpointing, offload)
    return _extrapolated(model, tokens, precision, lambda saved: saved.peak(checkpointing, offload))


def host_bytes(
    model: nn.Module, tokens: int, precision: str = "float32", checkpointing: str = "none"
) -> int:
    """Bytes that wait on the host between forward and backward, where activations are offloaded;
    otherwise as above.

    Room that is pinned is rounded up to a power of 2, storage by storage, which is not in it.
    """
    _validate(model, checkpointing, True)
    return _extrapolated(
        model, tokens, precision, lambda saved: sum(saved.bytes_by_block(checkpointing))
    )


def _validate(model: nn.Module, checkpointing: str, offload: bool) -> None:
    if checkpointing not in ("none", "full", "selective"):
        raise ValueError(
            f"checkpointing={checkpointing} is not offered; take none, full or selective"
        )
    if len(declared(model, "blocks", nn.ModuleList, ())):
        return
    if checkpointing != "none":
        raise ValueError(
            f"{type(model).__name__} has no blocks to compute again; use checkpointing=none"
        )
    if offload:
        raise ValueError(
            f"{type(model).__name__} has no blocks whose activations could wait on the host; use"
            " offload=False"
        )


def _extrapolated(
    model: nn.Module, tokens: int, precision: str, count: Callable[["_SavedBytes"], int]
) -> int:
    """`count` of so many tokens, on the line through those of two short rows."""
    few, more = (
        count(_saved_bytes(meta_twin(model, DTYPES[precision]), length)) for length in (64, 128)
    )
    return few + (more - few) * (tokens - 64) // 64


@dataclass
class _SavedBytes:
    """Bytes that a forward saves: outside the blocks, and of each block all, what came in, what a
    tape would keep, and the largest tensor."""

    outside: int
    inside: list[int]
    inputs: list[int]
    tapes: list[int]
    largest: list[int]

    def bytes_by_block(self, checkpointing: str) -> list[int]:
        """Of each block what lies between forward and backward."""
        if checkpointing == "none":
            return self.inside
        return [
            x + tape * (checkpointing == "selective")
            for x, tape in zip(self.inputs, self.tapes, strict=True)
        ]

    def peak(self, checkpointing: str, offload: bool) -> int:
        """A block that is computed again finds its input there, and its tape; the gradient of its
        largest tensor stands beside what it makes."""
        gradients = [size * (checkpointing != "none") for size in self.largest]
        whole = [inside + size for inside, size in zip(self.inside, gradients, strict=True)]
        if offload:
            return self.outside + max(whole)
        kept = self.bytes_by_block(checkpointing)
        again = max((size - there for size, there in zip(whole, kept, strict=True)), default=0)
        return self.outside + sum(kept) + max(0, again)


def _saved_bytes(model: nn.Module, tokens: int) -> _SavedBytes:
    """Of a forward on the meta device."""
    blocks: list[nn.Module] = [*declared(model, "blocks", nn.ModuleList, ())]
    place = len(blocks)
    sums = [0] * (len(blocks) + 1)
    found = _SavedBytes(0, [], *([0] * len(blocks) for _ in range(3)))
    seen = {
        id(p.untyped_storage()): p.untyped_storage() for p in model.parameters()
    }  # held: ids are not used again
    came: dict[int, Any] = {}  # what several blocks are given is there once

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in seen:
            seen[id(storage)] = storage
            sums[place] += storage.nbytes()
            if place < len(blocks):
                found.largest[place] = max(found.largest[place], storage.nbytes())
        return tensor

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal place
        place = blocks.index(module)
        for storage in (x.untyped_storage() for x in args if isinstance(x, Tensor)):
            found.inputs[place] += storage.nbytes() * (id(storage) not in came)
            came[id(storage)] = storage

    def leave(*_: Any) -> None:
        nonlocal place
        place = len(blocks)

    def tape(module: nn.Module, args: Any, mean: Tensor) -> None:
        if place < len(blocks):
            lse = mean.shape[:-1].numel() * torch.promote_types(mean.dtype, torch.float32).itemsize
            found.tapes[place] += mean.numel() * mean.element_size() + lse

    for block in blocks:
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
    trace_cost(model, CostTrace())
    for leaf in model.modules():
        if isinstance(leaf, Softmax):
            leaf.register_forward_hook(tape)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        batch = meta_batch(model, tokens)
        model(batch._replace(targets=batch.tokens))
    found.outside = sums[-1]
    found.inside = sums[:-1]
    return found
