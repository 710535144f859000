"""Parameter counts: all, active per token, and in embeddings; read from the built model."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.layer import hook
from models.micro_batch import MicroBatch
from models.span import Span

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters, tied ones once.

    Attributes: total: all. active: without what a token does not visit. embedding: in tables of
        tokens or positions.
    """

    total: int
    active: int
    embedding: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Read from the shapes; DTensors count whole. A module that visits part of itself says so:
    `active_share`."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    shares = active_shares(model)
    total = active = embedding = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        active += round(parameter.numel() * shares[name.rpartition(".")[0]])
        embedding += parameter.numel() if id(parameter) in tables else 0
    return ParameterCount(total, active, embedding)


def active_shares(model: nn.Module) -> dict[str, float]:
    """By module: which share of its parameters one token visits (experts), its own share times its
    parents'."""
    shares: dict[str, float] = {"": float(hook(model, "active_share"))}
    for name, module in model.named_modules():
        if name:
            shares[name] = shares[name.rpartition(".")[0]] * float(hook(module, "active_share"))
    return shares


def meta_twin(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).to(device="meta", dtype=dtype)


def meta_batch(model: nn.Module, tokens: int, source_tokens: int | None = None) -> MicroBatch:
    """Returns a row on the meta device, with a source where the model reads one.

    Args:
        source_tokens: of the source; None: as many as in the row.
    """
    source = None
    if hook(model, "reads_source"):
        source = MicroBatch(*meta_row(tokens if source_tokens is None else source_tokens))
    return MicroBatch(*meta_row(tokens), None, source)


def meta_row(tokens: int) -> tuple[Tensor, Span]:
    return torch.zeros(1, tokens, dtype=torch.long, device="meta"), Span.line(
        1, tokens, device="meta"
    )
