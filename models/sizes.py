"""What a model costs: parameters, floating-point operations and bytes; read from the built model, nothing is run.

Convention, printed with every MFU:

* A multiply and an add are 2 FLOPs. Only matrix products count: linear and convolution weights once for every token that
  is no padding, 2 (D + E) for every head and every visible pair of query and key, and the cores of linear time as
  models/cores.py says. Weights that see no tokens but other positions, as many in each step, say how many
  (`positions_per_step`) and count once for each of those.
* A pair is visible if the mask says so on the row as it was packed: causal, document by document, inside the window.
  PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) counts every pair of the row, 12 L H Q T a token in training;
  on one causal document ours is half of that, on many short ones far less, so our MFU is the lower one.
* Training is 3 times forward, of long convolutions 2 times. What is computed again (activation checkpointing, the stripes
  of a scan) and what a chunk adds to the recurrence it stands for do not count: utilisation is of useful work.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.area import visible_triples
from models.cores import Core, Long, Noted, note
from models.declared import declared
from models.mixing.softmax import Softmax
from models.span import Span

MATRICES = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d)
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, tied ones once.

    Attributes:
        total: all. active: without what a token does not visit. embedding: in tables of tokens or positions.
    """

    total: int
    active: int
    embedding: int


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of a model, for any row."""

    token_flops: int
    cores: tuple[Core, ...]
    convolutions: tuple[Long, ...] = ()
    step_flops: int = 0

    def forward(self, span: Span) -> int:
        """Of the rows of `span`, whole as they were packed, with what is done once in a step."""
        return self._products(span) + sum(core.forward(span) for core in self.convolutions)

    def training(self, span: Span) -> int:
        """Forward and backward."""
        return 3 * self._products(span) + sum(core.training(span) for core in self.convolutions)

    def _products(self, span: Span) -> int:
        kinds = {(core.mask, core.heads) for core in self.cores}
        triples = {(mask, heads): visible_triples(mask, span, heads) for mask, heads in kinds}
        pairs = sum(core.pair_flops * triples[core.mask, core.heads] for core in self.cores)
        return self.step_flops + self.token_flops * int(span.valid().sum()) + pairs


def count_parameters(model: nn.Module) -> Parameters:
    """Read from the shapes; DTensors count whole. A module that visits part of itself says so: `active_share`."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    shares = _shares(model)
    total = active = embedding = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        active += round(parameter.numel() * shares[name.rpartition(".")[0]])
        embedding += parameter.numel() if id(parameter) in tables else 0
    return Parameters(total, active, embedding)


def count_flops(model: nn.Module) -> Flops:
    """FLOPs of a model that is called with (tokens, span), by its matrices and by a trace on the meta device.

    A module whose weights see something else than tokens says how many positions it is given in a step:
    `positions_per_step`. One that multiplies by matrices that are no weights says how many multiply-adds that is a token:
    `products`.
    """
    shares = _shares(model)
    positions = _positions_per_step(model)
    each = once = 0
    for name, module in model.named_modules():
        elements = declared(module, "products", int, 0)
        elements += module.weight.numel() if isinstance(module, MATRICES) else 0
        if name in positions:
            once += elements * positions[name]
        else:
            each += round(elements * shares[name])
    twin, noted = _twin(model, torch.float32), Noted()
    note(twin, noted)
    with torch.no_grad():
        twin(*_line(2))
    return Flops(2 * (each + noted.products), tuple(noted.pairs), tuple(noted.convolutions), 2 * once)


def _positions_per_step(model: nn.Module) -> dict[str, int]:
    """By module: the positions that it sees in a step, of those that see no tokens."""
    positions: dict[str, int] = {}
    for name, module in model.named_modules():
        parent = positions.get(name.rpartition(".")[0])
        own = declared(module, "positions_per_step", int, parent)
        if own is not None:
            positions[name] = own
    return positions


def state_bytes(model: nn.Module, precision: str = "float32", shards: int = 1) -> dict[str, int]:
    """Bytes that stay on one device from step to step: parameters, gradients, optimiser (AdamW).

    Args:
        precision: bfloat16 keeps float32 parameters, gradients and moments, and computes with 2-byte copies beside them.
        shards: among how many devices the state is divided; 1 = whole on each.

    The copies are counted whole when shards is 1; sharded engines gather them block by block, the largest block counts.
    """
    stored = sum(-(-p.numel() // shards) for p in model.parameters()) * max(4, BYTES[precision])
    gathered = sum(p.numel() for p in model.parameters())
    if shards > 1:
        blocks = [sum(p.numel() for p in block.parameters()) for block in declared(model, "blocks", nn.ModuleList, ())]
        gathered = gathered - sum(blocks) + max(blocks, default=0)
    copies = gathered * BYTES[precision] if precision == "bfloat16" or shards > 1 else 0
    return {"parameters": stored, "copies": copies, "gradients": stored, "optimiser": 2 * stored}


def activation_bytes(
    model: nn.Module, tokens: int, precision: str = "float32", checkpointing: str = "none", offload: bool = False
) -> int:
    """Most bytes that autograd keeps of `tokens` tokens of one row on one device, of a forward and its backward.

    Counted on the meta device from what each operation saves, with the losses. Measured on the CPU, by every storage that
    lives (tests/parallel/test_held.py): between forward and backward decoders of attention and SwiGLU hold within 1% of
    it, other layers within 10%. What operations need while they run comes on top: at most 15% in decoders of attention and
    SwiGLU whose scores are plain; general scores, chunks of scans, other devices' kernels and the exchange may need more.

    Args:
        checkpointing: none; full = the inputs of all blocks and the inside of the largest one, which is computed again;
            selective = the mean and mass of every attention too.
        offload: what blocks save waits on the host (`host_bytes`): of the blocks the inside of the largest one counts. That
            is a bound where nothing is computed again: what comes back is dropped as soon as it was used.

    Raises:
        ValueError: another checkpointing, or one of a model that has no blocks to compute again or to offload.
    """
    _judge(model, checkpointing, offload)
    return _extended(model, tokens, precision, lambda saved: saved.peak(checkpointing, offload))


def host_bytes(model: nn.Module, tokens: int, precision: str = "float32", checkpointing: str = "none") -> int:
    """Bytes that wait on the host between forward and backward, where activations are offloaded; otherwise as above.

    Room that is pinned is rounded up to a power of 2, storage by storage, which is not in it.
    """
    _judge(model, checkpointing, True)
    return _extended(model, tokens, precision, lambda saved: sum(saved.kept(checkpointing)))


def _judge(model: nn.Module, checkpointing: str, offload: bool) -> None:
    if checkpointing not in ("none", "full", "selective"):
        raise ValueError(f"checkpointing={checkpointing} is not offered; take none, full or selective")
    if len(declared(model, "blocks", nn.ModuleList, ())):
        return
    if checkpointing != "none":
        raise ValueError(f"{type(model).__name__} has no blocks to compute again; use checkpointing=none")
    if offload:
        raise ValueError(f"{type(model).__name__} has no blocks whose activations could wait on the host; use offload=False")


def _extended(model: nn.Module, tokens: int, precision: str, count: Callable[["_Saved"], int]) -> int:
    """`count` of so many tokens, on the line through those of two short rows."""
    few, more = (count(_saved(_twin(model, DTYPES[precision]), length)) for length in (64, 128))
    return few + (more - few) * (tokens - 64) // 64


def _shares(model: nn.Module) -> dict[str, float]:
    """By module: which share of its parameters one token visits (experts), its own share times its parents'."""
    shares: dict[str, float] = {"": float(declared(model, "active_share", (int, float), 1.0))}
    for name, module in model.named_modules():
        if name:
            shares[name] = shares[name.rpartition(".")[0]] * float(declared(module, "active_share", (int, float), 1.0))
    return shares


def _twin(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).to(device="meta", dtype=dtype)


def _line(tokens: int) -> tuple[Tensor, Span]:
    return torch.zeros(1, tokens, dtype=torch.long, device="meta"), Span.line(1, tokens, device="meta")


@dataclass
class _Saved:
    """Bytes that a forward saves: outside the blocks, and of each block all, what came in, and what a tape would keep."""

    outside: int
    inside: list[int]
    inputs: list[int]
    tapes: list[int]

    def kept(self, checkpointing: str) -> list[int]:
        """Of each block what lies between forward and backward."""
        if checkpointing == "none":
            return self.inside
        return [x + tape * (checkpointing == "selective") for x, tape in zip(self.inputs, self.tapes, strict=True)]

    def peak(self, checkpointing: str, offload: bool) -> int:
        """A block that is computed again finds its input there, and its tape."""
        if offload:
            return self.outside + max(self.inside)
        kept = self.kept(checkpointing)
        again = max((inside - there for inside, there in zip(self.inside, kept, strict=True)), default=0)
        return self.outside + sum(kept) + max(0, again)


def _saved(model: nn.Module, tokens: int) -> _Saved:
    """Of a forward on the meta device."""
    blocks: list[nn.Module] = [*declared(model, "blocks", nn.ModuleList, ())]
    place, sums, found = len(blocks), [0] * (len(blocks) + 1), _Saved(0, [], [0] * len(blocks), [0] * len(blocks))
    seen = {id(p.untyped_storage()): p.untyped_storage() for p in model.parameters()}  # held: ids are not used again
    came: dict[int, Any] = {}  # what several blocks are given is there once

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in seen:
            seen[id(storage)] = storage
            sums[place] += storage.nbytes()
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
            mass = mean.shape[:-1].numel() * torch.promote_types(mean.dtype, torch.float32).itemsize
            found.tapes[place] += mean.numel() * mean.element_size() + mass

    for block in blocks:
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
    sequence, span = _line(tokens)
    note(model, Noted())
    for leaf in model.modules():
        if isinstance(leaf, Softmax):
            leaf.register_forward_hook(tape)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(sequence, span, sequence)
    found.outside, found.inside = sums[-1], sums[:-1]
    return found
