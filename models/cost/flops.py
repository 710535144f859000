"""FLOPs of a model, read from its modules and traced on the meta device; nothing is computed.

Convention, printed with every MFU:

* A multiply and an add are 2 FLOPs. Only matrix products count: weights of linear layers and
  convolutions once for every token that is not padding, and 2 (D + E) for every head and every
  visible pair of query and key. Weights that see other positions than tokens state how many
  (`positions_per_step`) and count once for each of those.
* A pair is visible if the mask says so on the packed row: causal, document by document, inside the
  window. PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) counts every pair of the row,
  12 L H Q T a token in training; one causal document gives half of that, many short ones far less.
* Compressed attention counts the tokens of its window and the summaries that it chooses, LSH the
  pairs that hashes share which spread tokens evenly; see Score.pair_counter.
* Attention of points that stand for a document: 2 M (D + E) for every head and token, M points. The
  weights that see points count once for every token.
* Scan: the recurrence. Writing k v into the state and reading it with q are D E multiply-adds each,
  for every head and token; a low-rank term reads once more and writes once more.
* Causal convolution: a multiply-add for every tap, channel and token.
* Long convolution: a document of n tokens is transformed in 2 n places, at 2.5 N log2 N FLOPs for a
  real transform of N (half of the usual 5 N log2 N for complex numbers), three times forward and
  three times backward, with products of n complex numbers between (6 FLOPs each): one forward, two
  backward.
* Not counted: searches of stores, sums over segments, and the products of a segment memory with its
  state. They are named by `counts_flops = False` of their primitive.
* Training is 3 times forward, 2 times for long convolutions. Recomputation (activation
  checkpointing, groups of scan chunks) does not count: utilisation is of useful work.

Letters: D key width, E value width, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import log2
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.causality import source_modules
from models.cost.parameters import active_shares, meta_batch, meta_twin
from models.cost.visible_pairs import pairs_across, visible_triples
from models.layer import hook
from models.masks.algebra import Mask
from models.primitive import Primitive
from models.primitives.causal_conv import CausalConv
from models.primitives.long_conv import LongConv
from models.primitives.pooled_attention import PointAttention, PooledAttention
from models.primitives.scan import Scan
from models.primitives.sequential import SequentialScan
from models.primitives.softmax import Softmax, value_width
from models.span import PADDING, Span


@dataclass(frozen=True)
class AttentionCost:
    """One softmax attention of the model: a query and a key that see each other cost `pair_flops`
    in each head.

    Attributes:
        across: the queries are tokens of the row and the keys those of its source.
        chosen: counts the pairs of a head where not all are computed that the mask shows.
    """

    mask: Mask
    heads: int
    pair_flops: int
    across: bool = False
    chosen: Callable[[Span], int] | None = None

    def forward(self, span: Span, source_span: Span) -> int:
        """FLOPs of all rows."""
        if self.chosen is not None:
            return self.pair_flops * self.heads * self.chosen(span)
        if self.across:
            return self.pair_flops * self.heads * pairs_across(self.mask, span, source_span)
        return self.pair_flops * visible_triples(self.mask, span, self.heads)


@dataclass(frozen=True)
class LongConvCost:
    """One convolution of the model as long as the documents."""

    channels: int

    def forward(self, span: Span) -> int:
        return self._count(span, products=1)

    def training(self, span: Span) -> int:
        return self.forward(span) + self._count(span, products=2)

    def _count(self, span: Span, products: int) -> int:
        return self.channels * sum(
            round(3 * 2.5 * 2 * n * log2(2 * n) + products * 6 * n) for n in _stretches(span)
        )


@dataclass
class CostTrace:
    """The result of a trace: softmax attentions, long convolutions, multiply-adds of scans."""

    pairs: list[AttentionCost] = field(default_factory=list)
    convolutions: list[LongConvCost] = field(default_factory=list)
    products: int = 0
    of_source: bool = False


def trace_cost(model: nn.Module, noted: CostTrace, of_source: CostTrace | None = None) -> None:
    """Let every leaf of a twin on the meta device note what it costs; a Softmax gives back a mean
    without computing one.

    Args:
        of_source: takes what leaves cost that read the source; they note it with the others where
            it is None.

    Raises:
        TypeError: a primitive is neither watched nor declared as not counted.
    """
    readers = set() if of_source is None else source_modules(model)
    for leaf in list(model.modules()):
        watched = False
        trace = of_source if of_source is not None and leaf in readers else noted
        for kind, watch in WATCHES.items():
            if isinstance(leaf, kind):
                leaf.forward = watch(leaf, trace)
                watched = True
        # A primitive that nobody thought of would count 0 FLOPs, and every MFU would be too low.
        if isinstance(leaf, Primitive) and leaf.counts_flops and not watched:
            kind_name = type(leaf).__name__
            raise TypeError(
                f"no FLOP count for {kind_name}; add it to WATCHES in models/cost/flops.py, or set"
                f" {kind_name}.counts_flops = False"
            )


def _softmax(leaf: Softmax, noted: CostTrace) -> Any:
    def forward(query: Any, payload: Any, params: Any = (), **addresses: Any) -> Tensor:
        dim = leaf.score.query_heads[0]
        heads = query[0].shape[dim] if dim is not None else 1
        q = leaf.score.operands(query, payload, params)[0]
        width = value_width(leaf.score, payload, params, query)
        across = noted.of_source and payload[0].shape[1] != query[0].shape[1]
        chosen = leaf.score.pair_counter()
        flops = 2 * (q.shape[-1] + width)
        noted.pairs.append(AttentionCost(leaf.mask, heads, flops, across, chosen))
        return _EmptyOutput.apply((*query[0].shape[:2], heads, width), *query, *payload, *params)

    return forward


def _points(leaf: PooledAttention | PointAttention, noted: CostTrace) -> Any:
    def forward(query: Any, payload: Any, *, span: Span, kv_span: Span) -> Tensor:
        key, value = payload
        # The trace has one document a row, so one side has the points of one document.
        points = query[0] if isinstance(leaf, PooledAttention) else key
        widths = key.shape[-1] + value.shape[-1]
        noted.products += points.shape[1] * query[0].shape[2] * widths
        shape = (*query[0].shape[:3], value.shape[-1])
        return _EmptyOutput.apply(shape, *query, *payload)

    return forward


def _scan(leaf: Scan, noted: CostTrace) -> Any:
    compute = leaf.forward

    def forward(query: Any, payload: Any, *rest: Any, **addresses: Any) -> Tensor:
        keys, values, _, *low = payload
        noted.products += (4 if low else 2) * values.shape[2:].numel() * keys.shape[3]
        return compute(query, payload, *rest, **addresses)

    return forward


def _window(leaf: CausalConv, noted: CostTrace) -> Any:
    compute = leaf.forward

    def forward(payload: Any, params: Any, **addresses: Any) -> Tensor:
        noted.products += params[0].numel()
        return compute(payload, params, **addresses)

    return forward


def _convolution(leaf: LongConv, noted: CostTrace) -> Any:
    compute = leaf.forward

    def forward(payload: Any, params: Any, **addresses: Any) -> Tensor:
        noted.convolutions.append(LongConvCost(payload[0].shape[2]))
        return compute(payload, params, **addresses)

    return forward


def _relay(leaf: SequentialScan, noted: CostTrace) -> Any:
    def forward(step: Any, xs: Any, state: Any, *, span: Span, **cuts: Any) -> Any:
        return step(
            tuple(xs), span, tuple(state)
        )  # the whole row at once: where documents open is not known here

    return forward


WATCHES = {
    Softmax: _softmax,
    PooledAttention: _points,
    PointAttention: _points,
    Scan: _scan,
    CausalConv: _window,
    LongConv: _convolution,
    SequentialScan: _relay,
}


def _stretches(span: Span) -> list[int]:
    """Lengths of the documents of all rows, one that a row's end cuts counting as two."""
    found = []
    for pos, doc in zip(span.pos.cpu().numpy(), span.doc.cpu().numpy(), strict=True):
        edges = (
            np.flatnonzero(np.r_[True, (np.diff(doc) != 0) | (np.diff(pos) != 1), True])
            if len(doc)
            else np.zeros(1, int)
        )
        found += [int(b - a) for a, b in zip(edges[:-1], edges[1:]) if doc[a] != PADDING]
    return found


class _EmptyOutput(torch.autograd.Function):
    """Saves what an attention saves (its inputs, the mean, the mass) and computes nothing."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], *tensors: Tensor) -> Tensor:
        mean = tensors[0].new_empty(shape)
        wide = torch.promote_types(mean.dtype, torch.float32)
        ctx.save_for_backward(*tensors, mean, mean.new_empty(shape[:-1], dtype=wide))
        return mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("a trace of costs computes nothing, so it has no gradients")


MATRICES = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class FlopCount:
    """Forward FLOPs of a model, for any row.

    Attributes: source: those of what it does with the source of a row; None where it reads none.
    """

    token_flops: int
    cores: tuple[AttentionCost, ...]
    convolutions: tuple[LongConvCost, ...] = ()
    step_flops: int = 0
    source: "FlopCount | None" = None

    def forward(self, span: Span, source_span: Span | None = None) -> int:
        """Of the rows of `span`, whole as they were packed, with what is done once in a step.

        Args:
            source_span: addresses of their sources; None: as those of the rows.
        """
        source_span = span if source_span is None else source_span
        total = self._products(span, source_span)
        total += sum(core.forward(span) for core in self.convolutions)
        return total + (0 if self.source is None else self.source.forward(source_span))

    def training(self, span: Span, source_span: Span | None = None) -> int:
        """Forward and backward."""
        source_span = span if source_span is None else source_span
        total = 3 * self._products(span, source_span)
        total += sum(core.training(span) for core in self.convolutions)
        return total + (0 if self.source is None else self.source.training(source_span))

    def _products(self, span: Span, source_span: Span) -> int:
        kinds = {replace(core, pair_flops=1) for core in self.cores}
        counts = {kind: kind.forward(span, source_span) for kind in kinds}
        pairs = sum(core.pair_flops * counts[replace(core, pair_flops=1)] for core in self.cores)
        return self.step_flops + self.token_flops * int(span.valid().sum()) + pairs


def count_flops(model: nn.Module) -> FlopCount:
    """FLOPs of a model that is called with (tokens, span), by its matrices and by a trace on the
    meta device.

    A module whose weights see something else than tokens says how many positions it is given in a
    step: `positions_per_step`. One that multiplies by matrices that are no weights says how many
    multiply-adds that is a token: `multiply_adds`.
    """
    shares = active_shares(model)
    positions = _positions_per_step(model)
    readers = source_modules(model)
    each = once = of_source = 0
    for name, module in model.named_modules():
        elements = hook(module, "multiply_adds")
        elements += module.weight.numel() if isinstance(module, MATRICES) else 0
        if name in positions:
            once += elements * positions[name]
        elif module in readers:
            of_source += round(elements * shares[name])
        else:
            each += round(elements * shares[name])
    twin = meta_twin(model, torch.float32)
    noted = CostTrace()
    source_noted = CostTrace(of_source=True)
    trace_cost(twin, noted, source_noted)
    limits = [hook(module, "max_length") for module in model.modules()]
    # Two tokens, of which one sees the other, unless a layer takes documents of a single one.
    tokens = min([2, *(limit for limit in limits if limit is not None)])
    with torch.no_grad():
        # A source of another length than the row tells attention across from attention within.
        twin(meta_batch(model, tokens, 1 if tokens > 1 else 2))
    source = None
    if hook(model, "reads_source"):
        source = FlopCount(
            2 * (of_source + source_noted.products),
            tuple(core for core in source_noted.pairs if not core.across),
            tuple(source_noted.convolutions),
        )
    across = [core for core in source_noted.pairs if core.across]
    return FlopCount(
        2 * (each + noted.products),
        (*noted.pairs, *across),
        tuple(noted.convolutions),
        2 * once,
        source,
    )


def _positions_per_step(model: nn.Module) -> dict[str, int]:
    """By module: the positions that it sees in a step, of those that see no tokens."""
    positions: dict[str, int] = {}
    for name, module in model.named_modules():
        parent = positions.get(name.rpartition(".")[0])
        stated = hook(module, "positions_per_step")
        own = parent if stated is None else stated
        if own is not None:
            positions[name] = own
    return positions
