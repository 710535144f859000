"""What the leaves of a model compute beside its weights: noted by a trace on the meta device, counted for any row.

Convention, beside that of models/sizes.py: what the shortest known way takes, whatever the kernel does.

* Scan: the recurrence. Writing k v into the state and reading it with q are D E multiply-adds each, for every head and token;
  a low-rank term reads once more and writes once more.
* Window: a multiply-add for every tap, channel and token.
* Convolution: a document of n tokens is transformed in 2 n places, at 2.5 N log2 N FLOPs a real transform of N (half of the
  5 N log2 N that one of complex numbers is usually said to take), three times forward and three times backward, with
  products of n complex numbers between, 6 FLOPs each: one forward, two backward.

Letters: D key width, E value width, H heads.
"""

from dataclasses import dataclass, field
from math import log2
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.masks import Mask
from models.mixing.convolution import Convolution
from models.mixing.relay import Relay
from models.mixing.scan import Scan
from models.mixing.softmax import Softmax, value_width
from models.mixing.window import Window
from models.span import PADDING, Span


@dataclass(frozen=True)
class Core:
    """One softmax attention of the model: a query and a key that see each other cost `pair_flops` in each head."""

    mask: Mask
    heads: int
    pair_flops: int


@dataclass(frozen=True)
class Long:
    """One convolution of the model as long as the documents."""

    channels: int

    def forward(self, span: Span) -> int:
        return self._count(span, products=1)

    def training(self, span: Span) -> int:
        return self.forward(span) + self._count(span, products=2)

    def _count(self, span: Span, products: int) -> int:
        return self.channels * sum(round(3 * 2.5 * 2 * n * log2(2 * n) + products * 6 * n) for n in _stretches(span))


@dataclass
class Noted:
    """What a trace found: softmax attentions, long convolutions, and multiply-adds a token of scans and windows."""

    pairs: list[Core] = field(default_factory=list)
    convolutions: list[Long] = field(default_factory=list)
    products: int = 0


def note(model: nn.Module, noted: Noted) -> None:
    """Let every leaf of a twin on the meta device note what it costs; a Softmax gives back a mean without computing one."""
    for leaf in list(model.modules()):
        for kind, watch in WATCHES.items():
            if isinstance(leaf, kind):
                leaf.forward = watch(leaf, noted)


def _softmax(leaf: Softmax, noted: Noted) -> Any:
    def forward(query: Any, payload: Any, params: Any = (), **addresses: Any) -> Tensor:
        dim = leaf.score.query_heads[0]
        heads = query[0].shape[dim] if dim is not None else 1
        q = leaf.score.operands(query, payload, params)[0]
        width = value_width(leaf.score, payload, params, query)
        noted.pairs.append(Core(leaf.mask, heads, 2 * (q.shape[-1] + width)))
        return _Mean.apply((*query[0].shape[:2], heads, width), *query, *payload, *params)

    return forward


def _scan(leaf: Scan, noted: Noted) -> Any:
    compute = leaf.forward

    def forward(query: Any, payload: Any, *rest: Any, **addresses: Any) -> Tensor:
        keys, values, _, *low = payload
        noted.products += (4 if low else 2) * values.shape[2:].numel() * keys.shape[3]
        return compute(query, payload, *rest, **addresses)

    return forward


def _window(leaf: Window, noted: Noted) -> Any:
    compute = leaf.forward

    def forward(payload: Any, params: Any, **addresses: Any) -> Tensor:
        noted.products += params[0].numel()
        return compute(payload, params, **addresses)

    return forward


def _convolution(leaf: Convolution, noted: Noted) -> Any:
    compute = leaf.forward

    def forward(payload: Any, params: Any, **addresses: Any) -> Tensor:
        noted.convolutions.append(Long(payload[0].shape[2]))
        return compute(payload, params, **addresses)

    return forward


def _relay(leaf: Relay, noted: Noted) -> Any:
    def forward(step: Any, xs: Any, state: Any, *, at: Span, **cuts: Any) -> Any:
        return step(tuple(xs), at, tuple(state))  # the whole row at once: where documents open is not known here

    return forward


WATCHES = {Softmax: _softmax, Scan: _scan, Window: _window, Convolution: _convolution, Relay: _relay}


def _stretches(span: Span) -> list[int]:
    """Lengths of the documents of all rows, one that a row's end cuts counting as two."""
    found = []
    for pos, doc in zip(span.pos.cpu().numpy(), span.doc.cpu().numpy(), strict=True):
        edges = np.flatnonzero(np.r_[True, (np.diff(doc) != 0) | (np.diff(pos) != 1), True]) if len(doc) else np.zeros(1, int)
        found += [int(b - a) for a, b in zip(edges[:-1], edges[1:]) if doc[a] != PADDING]
    return found


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
