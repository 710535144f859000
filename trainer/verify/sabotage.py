"""Breaks a driver on purpose, so that the doctor can be seen to notice it."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from models.primitive import Primitive
from models.span import Span

BREAKS = ("mask", "scale", "leak", "order")


def sabotage_driver(model: nn.Module, kind: str) -> None:
    """Breaks the first driver of a model in one of the ways of BREAKS.

    Raises:
        ValueError: the model has no driver.
    """
    for module in model.modules():
        if hasattr(module, "core") and isinstance(module.core, Primitive):
            driver = module
            break
    else:
        raise ValueError(f"doctor.break={kind} needs a driver to break, and this model has none")
    forward = driver.forward

    def broken_forward(*arguments: Any, **named: Any) -> Any:
        falsified = [_falsified(value, kind) for value in arguments]
        falsified_named = {key: _falsified(value, kind) for key, value in named.items()}
        output = forward(*falsified, **falsified_named)
        return output * 1.001 if kind == "scale" else output

    driver.forward = broken_forward


def _falsified(value: Any, kind: str) -> Any:
    """Falsifies the addresses of a Span; returns other values as they are.

    mask: all positions are equal. leak: all tokens belong to one document. order: the parts of the
    ranks are exchanged.
    """
    if not isinstance(value, Span) or kind == "scale":
        return value
    sharding = value.sharding
    if kind == "order":
        rotated = []
        for layout in sharding.layouts:
            rotated.append(replace(layout, runs=(*layout.runs[1:], layout.runs[0])))
        spans = (*sharding.spans[1:], sharding.spans[0])
        # Cached orders belong to the true layout, and would hide the exchange.
        sharding = replace(sharding, layouts=tuple(rotated), orders=[], spans=spans)
        return value.with_sharding(sharding)
    falsify = _equal_positions if kind == "mask" else _one_document
    spans = tuple(falsify(span) for span in sharding.spans)
    sharding = replace(sharding, spans=spans, whole=falsify(sharding.whole))
    return falsify(value).with_sharding(sharding)


def _equal_positions(span: Span) -> Span:
    return Span(torch.zeros_like(span.pos), span.doc, span.role)


def _one_document(span: Span) -> Span:
    pos = torch.arange(span.shape[1]).expand_as(span.pos)
    valid = span.valid()
    return Span(torch.where(valid, pos, 0), torch.where(valid, 0, -1), span.role)
