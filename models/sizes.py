"""What a model costs: parameters, floating-point operations and bytes; read from the built model, nothing is run.

Convention, printed with every MFU:

* A multiply and an add are 2 FLOPs. Only matrix products count: linear and convolution weights once for every token that
  is no padding, and 2 (D + E) for every head and every visible pair of query and key.
* A pair is visible if the mask says so on the row as it was packed: causal, document by document, inside the window.
  PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) counts every pair of the row, 12 L H Q T a token in training;
  on one causal document ours is half of that, on many short ones far less, so our MFU is the lower one.
* Training is 3 times forward. What activation checkpointing computes again does not count: utilisation is of useful work.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.area import visible_triples
from models.masks import Mask
from models.mixing.softmax import Softmax, value_width
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
class Core:
    """One softmax attention of the model: a query and a key that see each other cost `pair_flops` in each head."""

    mask: Mask
    heads: int
    pair_flops: int


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of a model, for any row."""

    token_flops: int
    cores: tuple[Core, ...]

    def forward(self, span: Span) -> int:
        """Of the rows of `span`, whole as they were packed."""
        kinds = {(core.mask, core.heads) for core in self.cores}
        triples = {(mask, heads): visible_triples(mask, span, heads) for mask, heads in kinds}
        pairs = sum(core.pair_flops * triples[core.mask, core.heads] for core in self.cores)
        return self.token_flops * int(span.valid().sum()) + pairs

    def training(self, span: Span) -> int:
        """Forward and backward."""
        return 3 * self.forward(span)


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
    """FLOPs of a model that is called with (tokens, span), by its matrices and by a trace on the meta device."""
    shares = _shares(model)
    elements = sum(
        round(module.weight.numel() * shares[name])
        for name, module in model.named_modules()
        if isinstance(module, MATRICES)
    )
    cores: list[Core] = []
    twin = _twin(model, torch.float32)
    _trace(twin, cores)
    with torch.no_grad():
        twin(*_line(2))
    return Flops(2 * elements, tuple(cores))


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
        blocks = [sum(p.numel() for p in block.parameters()) for block in getattr(model, "blocks", ())]
        gathered = gathered - sum(blocks) + max(blocks, default=0)
    copies = gathered * BYTES[precision] if precision == "bfloat16" or shards > 1 else 0
    return {"parameters": stored, "copies": copies, "gradients": stored, "optimiser": 2 * stored}


def activation_bytes(model: nn.Module, tokens: int, precision: str = "float32", checkpointing: str = "none") -> int:
    """Bytes that autograd keeps from forward to backward for `tokens` tokens of one row on one device.

    Counted on the meta device from what each operation saves, with the losses; `checkpointing="full"` keeps the inputs
    of the blocks and one block's inside. Buffers of kernels and of the exchange come on top.
    """
    few, more = (_saved(_twin(model, DTYPES[precision]), count) for count in (64, 128))
    (outside, blocks, inputs), (outside2, blocks2, inputs2) = few, more
    kept = (outside + sum(blocks), outside2 + sum(blocks2))
    if checkpointing == "full":
        kept = (outside + inputs + max(blocks, default=0), outside2 + inputs2 + max(blocks2, default=0))
    return kept[0] + (kept[1] - kept[0]) * (tokens - 64) // 64


def _shares(model: nn.Module) -> dict[str, float]:
    """By module: which share of its parameters one token visits (experts), its own share times its parents'."""
    shares: dict[str, float] = {"": float(getattr(model, "active_share", 1.0))}
    for name, module in model.named_modules():
        if name:
            shares[name] = shares[name.rpartition(".")[0]] * float(getattr(module, "active_share", 1.0))
    return shares


def _twin(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).to(device="meta", dtype=dtype)


def _line(tokens: int) -> tuple[Tensor, Span]:
    return torch.zeros(1, tokens, dtype=torch.long, device="meta"), Span.line(1, tokens, device="meta")


def _trace(model: nn.Module, cores: list[Core]) -> None:
    """Let every Softmax of a twin note what a pair costs it, and give back a mean without computing one."""
    for leaf in list(model.modules()):
        if isinstance(leaf, Softmax):
            leaf.forward = _noting(leaf, cores)


def _noting(leaf: Softmax, cores: list[Core]) -> Any:
    def forward(query: Any, payload: Any, params: Any = (), **addresses: Any) -> Tensor:
        dim = leaf.score.query_heads[0]
        heads = query[0].shape[dim] if dim is not None else 1
        q = leaf.score.operands(query, payload, params)[0]
        width = value_width(leaf.score, payload, params, query)
        cores.append(Core(leaf.mask, heads, 2 * (q.shape[-1] + width)))
        return _Mean.apply((*query[0].shape[:2], heads, width), *query, *payload, *params)

    return forward


class _Mean(torch.autograd.Function):
    """Saves what an attention saves (its inputs, the mean, the mass) and computes nothing."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], *tensors: Tensor) -> Tensor:
        mean = tensors[0].new_empty(shape)
        wide = torch.promote_types(mean.dtype, torch.float32)
        ctx.save_for_backward(*tensors, mean, mean.new_empty(shape[:-1], dtype=wide))
        return mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


def _saved(model: nn.Module, tokens: int) -> tuple[int, list[int], int]:
    """(bytes saved outside blocks, inside each block, bytes of the blocks' inputs) of a forward on the meta device."""
    blocks: list[nn.Module] = [*getattr(model, "blocks", [])]
    sums, inputs, place = [0] * (len(blocks) + 1), 0, len(blocks)
    seen = {id(p.untyped_storage()): p.untyped_storage() for p in model.parameters()}  # held: ids are not used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in seen:
            seen[id(storage)] = storage
            sums[place] += storage.nbytes()
        return tensor

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal place, inputs
        place = blocks.index(module)
        inputs += sum(x.numel() * x.element_size() for x in args if isinstance(x, Tensor))

    def leave(*_: Any) -> None:
        nonlocal place
        place = len(blocks)

    for block in blocks:
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
    sequence, span = _line(tokens)
    _trace(model, [])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(sequence, span, sequence)
    return sums[-1], sums[:-1], inputs
