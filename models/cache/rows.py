"""Rows of tensors: those that stand at an index, those that are kept, and their addresses.

Letters: B rows, N tokens, M of them.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from models.span import DerivedCache, Span


def packed(span: Span) -> tuple[Tensor, Span]:
    """Returns (index [B, N] that puts the tokens of each row first, their addresses)."""
    valid = span.valid()
    order = (~valid).to(torch.int8).argsort(dim=1, stable=True)
    order = order[:, : max(1, int(valid.sum(1).max()))]
    return order, span.map(lambda tensor: tensor.gather(1, order))


def taken(x: Tensor, index: Tensor) -> Tensor:
    """[B, N, ...] at [B, M] -> [B, M, ...]."""
    index = index.view(*index.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(*index.shape[:2], *x.shape[2:]))


def selected(
    imported: dict[str, tuple[list[Tensor], Span]], rows: Tensor
) -> dict[str, tuple[list[Tensor], Span]]:
    """Keeps these rows; places that had the same addresses still share them."""
    spans = DerivedCache()
    kept = {}
    for name, (payload, span) in imported.items():
        kept_span = spans.get("rows", partial(span.map, lambda tensor: tensor[rows]), span)
        kept[name] = [tensor[rows] for tensor in payload], kept_span
    return kept


def found_span(found: Mapping[str, Tensor], path: str) -> Span:
    """The addresses that were exported under this path."""
    return Span(found[f"{path}/pos"], found[f"{path}/doc"], found[f"{path}/role"])
