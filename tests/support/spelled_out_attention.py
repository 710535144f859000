"""An attention layer written out with the named functions of models/attention/functional.py: slow,
plain, the truth."""

import torch

from models.attention.functional import (
    attention_scores,
    attention_weights,
    context_vector,
    masked_scores,
    scaled_scores,
)
from models.init import initialise
from models.masks.algebra import Mask, visible
from models.span import Span
from tests.support.parity import packed

WIDTH, HEADS, KV = 24, 6, 3


def given(layer, seed=4):
    """A layer in float64 with weights large enough to matter, an input of packed documents, and
    their span."""
    layer = initialise(layer, seed=1).double()
    for parameter in layer.parameters():
        parameter.data *= 10
    span = packed()
    x = torch.randn(
        *span.shape, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return layer, x, span


def spelled(layer, x, span: Span, mask: Mask, bend=lambda scores: scores):
    """What a layer of queries, keys, values and `out` gives; `bend` changes the scaled scores
    before the mask."""
    q, k, v = (
        project(x).unflatten(-1, (-1, layer.head_width)) for project in (layer.q, layer.k, layer.v)
    )
    q, k = layer.position.rotate(q, span), layer.position.rotate(k, span)
    scores = masked_scores(
        bend(scaled_scores(attention_scores(q, k), layer.head_width)), visible(mask, span, span)
    )
    return layer.out(context_vector(attention_weights(scores), v).flatten(-2))


def furthest(a, b, span: Span) -> float:
    """Largest difference at tokens that are no padding."""
    return ((a - b) * span.valid()[..., None]).abs().max().item()


def touched(layer, x, span: Span, token: int, row: int = 0) -> set[int]:
    """Which tokens of its row change what comes out at a token."""
    x = x.clone().requires_grad_()
    layer(x, span)[row, token].square().sum().backward()
    return set(x.grad[row].abs().sum(-1).nonzero()[:, 0].tolist())
