"""AllGather driver of Softmax: fetches only the keys that a rank's queries see, then attends once.

A window becomes an exchange with neighbours, packed documents send only what they share, a source
of another length is cross-attention, and the dense case is the all-gather. Every rank derives from
the addresses what each other rank needs, so no request is sent. Backward fetches again: no rank
keeps keys of another between the two passes.

Source: Llama 3 (arXiv:2407.21783, section 3.3.2) gathers all keys; Tao et al. 2025, MagiAttention,
only needed ranges. Ours plans by single tokens, from any mask, and sums the returning gradients in
float32.

Letters: B rows, T queries, S local keys, F fetched keys of a row, P ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.kernels import blockwise
from models.kernels.block_plan import PARTIAL_TILE, plan_tiles
from models.kernels.reference import Partial, accumulation_dtype
from models.masks.algebra import Mask, visible
from models.plans import planned
from models.primitives.attention_tape import AttentionReplay
from models.primitives.softmax import (
    Softmax,
    add_sink,
    attention_spec,
    incoming_gradients,
    sink_gradient,
    split_tensors,
    value_width,
)
from models.scores import Tensors
from models.span import PADDING, TEXT, Span
from parallel.collectives import Communicator


@dataclass(frozen=True)
class GatherPlan:
    """The exchange for one mask and one pair of spans.

    Attributes:
        gives: for each rank the flat numbers (row x S + token) of the local keys that it needs,
            this rank included.
        takes: number of keys that come from each rank.
        place: [B, F] positions of the fetched keys among all keys that arrive; slots that a row
            does not need point one beyond the last.
        span: [B, F] addresses of the fetched keys, in global order.
    """

    gives: tuple[Tensor, ...]
    takes: tuple[int, ...]
    place: Tensor
    span: Span


def needed_tokens(mask: Mask, span: Span, kv_span: Span, heads: Tensor) -> Tensor:
    """Returns [B, S] bool on the CPU: the keys of `kv_span` that a query of `span` sees."""
    needed = torch.zeros(kv_span.shape, dtype=torch.bool)
    for tile in plan_tiles(mask, span, kv_span):
        rows = slice(tile.r0, tile.r1)
        queries = slice(tile.q0, tile.q1)
        keys = slice(tile.k0, tile.k1)
        if tile.kind != PARTIAL_TILE:
            needed[rows, keys] = True
            continue
        tile_visible = visible(
            mask,
            _part(span, rows, queries),
            _part(kv_span, rows, keys),
            heads,
        )
        needed[rows, keys] |= tile_visible.any(2).any(1).cpu()
    return needed


def _part(span: Span, rows: slice, tokens: slice) -> Span:
    return span.map(lambda tensor: tensor[rows, tokens])


@planned
def gather_plan(mask: Mask, span: Span, kv_span: Span, heads: Tensor) -> GatherPlan:
    """Returns the exchange that brings every rank the keys of its queries.

    It is derived once and cached on the sharding of the queries.
    """
    cache = span.sharding.kept
    key = ("need", mask, id(kv_span.sharding), len(heads))
    if key not in cache:
        # Holding kv_span keeps the id in the key from being reused by another object.
        cache[key] = (kv_span, _gather_plan(mask, span, kv_span, heads))
    return cache[key][1]


def _gather_plan(mask: Mask, span: Span, kv_span: Span, heads: Tensor) -> GatherPlan:
    rank = span.sharding.rank
    device = kv_span.pos.device
    query_spans = span.sharding.spans
    key_spans = kv_span.sharding.spans
    gives = []
    for remote_queries in query_spans:
        needed = needed_tokens(mask, remote_queries, key_spans[rank], heads)
        gives.append(needed.flatten().nonzero()[:, 0])
    needed_by_source = [
        needed_tokens(mask, query_spans[rank], remote_keys, heads) for remote_keys in key_spans
    ]
    takes = [int(needed.sum()) for needed in needed_by_source]
    # Position of each needed key among those that arrive: rank by rank, then row by row.
    positions = []
    global_indices = []
    for source, needed in enumerate(needed_by_source):
        position = needed.flatten().cumsum(0) - 1 + sum(takes[:source])
        positions.append(position.view_as(needed))
        global_indices.append(kv_span.sharding.index(source, len(needed)))
    arrivals = torch.cat(positions, 1)
    chosen = torch.cat(needed_by_source, 1)
    # Keys that a row does not need are sorted behind all others and cut off.
    beyond = torch.iinfo(torch.int64).max
    sort_keys = torch.where(chosen, torch.cat(global_indices, 1), beyond)
    order = sort_keys.argsort(1)[:, : int(chosen.sum(1).max())]
    is_key = chosen.gather(1, order)
    place = torch.where(is_key, arrivals.gather(1, order), sum(takes))

    def fetched_addresses(field: str, fill: int) -> Tensor:
        addresses = torch.cat([getattr(remote, field) for remote in key_spans], 1)
        return torch.where(is_key.to(device), addresses.gather(1, order.to(device)), fill)

    fetched_span = Span(
        fetched_addresses("pos", 0),
        fetched_addresses("doc", PADDING),
        fetched_addresses("role", TEXT),
    )
    return GatherPlan(
        gives=tuple(indices.to(device) for indices in gives),
        takes=tuple(takes),
        place=place.to(device),
        span=fetched_span,
    )


def gather_needed(
    payload: Tensors, plan: GatherPlan, communicator: Communicator, name: str
) -> list[Tensor]:
    """Fetches the keys that this rank needs: [B, S, ...] of every rank -> [B, F, ...].

    Slots that a row does not need are zero.
    """
    fetched = []
    for x in payload:
        flat = x.flatten(0, 1)
        numbers = x[0, 0].numel() if x.numel() else 0
        parts = [flat.index_select(0, indices) for indices in plan.gives]
        sizes = [count * numbers for count in plan.takes]
        arrived = torch.cat(communicator.all_to_all(parts, sizes, name))
        # One row of zeros behind the last key is what unneeded slots point to.
        filler = x.new_zeros(1, *x.shape[2:])
        arrived = torch.cat([arrived.view(-1, *x.shape[2:]), filler])
        fetched.append(arrived[plan.place])
    return fetched


def reduce_to_owner(
    grads: Tensors, payload: Tensors, plan: GatherPlan, communicator: Communicator, name: str
) -> list[Tensor]:
    """Sends gradients of fetched keys home and sums them, the adjoint of `gather_needed`.

    Args:
        grads: [B, F, ...], one for each tensor of the payload.

    Returns:
        [B, S, ...] sums over all ranks, at least in float32.
    """
    owner_sums = []
    for gradient, x in zip(grads, payload, strict=True):
        total = sum(plan.takes)
        outgoing = gradient.new_zeros(total + 1, *x.shape[2:])
        # Every key was fetched into one slot; only the filler behind the last is written twice.
        outgoing[plan.place] = gradient
        sizes = [indices.numel() * x[0, 0].numel() for indices in plan.gives]
        parts = communicator.all_to_all(outgoing[:total].split(list(plan.takes)), sizes, name)
        sums = torch.zeros_like(
            x, dtype=accumulation_dtype(x.dtype), memory_format=torch.contiguous_format
        )
        for indices, part in zip(plan.gives, parts):
            source = part.view(-1, *x.shape[2:]).to(sums.dtype)
            sums.flatten(0, 1).index_add_(0, indices, source)
        owner_sums.append(sums)
    return owner_sums


class AllGather(nn.Module):
    """Replaces a Softmax whose tokens are sharded over the ranks of `communicator`."""

    def __init__(self, core: Softmax, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    def forward(
        self,
        query: Tensors,
        payload: Tensors,
        params: Tensors = (),
        *,
        span: Span,
        kv_span: Span | None = None,
        heads: Tensor | None = None,
    ) -> Tensor:
        """Runs Softmax.forward over every rank's keys.

        `span.sharding` (and `kv_span.sharding`) say which rank holds which tokens.
        """
        if span.sharding is None:  # every rank has these tokens: one step of decoding
            return self.core(query, payload, params, span=span, kv_span=kv_span, heads=heads)
        spec = attention_spec(self.core.mask, self.core.score, query, heads)
        key_span = span if kv_span is None else kv_span
        if span.past is not None:
            payload, key_span = span.past.hold(self.core, payload, key_span)
        plan = gather_plan(spec.mask, span, key_span, spec.heads)
        return _AllGather.apply(
            spec,
            self.core.kept,
            self.communicator,
            plan,
            span,
            len(query),
            len(payload),
            *query,
            *payload,
            *params,
        )


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        spec: blockwise.AttentionSpec,
        replay: AttentionReplay,
        communicator: Communicator,
        plan: GatherPlan,
        span: Span,
        queries: int,
        payloads: int,
        *tensors: Tensor,
    ) -> Tensor:
        query, payload, params = split_tensors(tensors, queries, payloads)

        def compute() -> Partial:
            width = value_width(spec.score, payload, params, query)
            total = blockwise.empty_partial(query, len(spec.heads), width)
            fetched = gather_needed(payload, plan, communicator, "allgather")
            blockwise.forward(spec, query, fetched, params, span, plan.span, total)
            add_sink(spec.score, params, total)
            return total[0].to(query[0].dtype), total[1]

        output, lse = replay.replay_or_compute(compute)
        ctx.spec = spec
        ctx.communicator = communicator
        ctx.plan = plan
        ctx.span = span
        ctx.counts = (queries, payloads)
        ctx.save_for_backward(output, lse, *tensors)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        communicator = ctx.communicator
        plan = ctx.plan
        output, lse, *tensors = ctx.saved_tensors
        query, payload, params = split_tensors(tensors, *ctx.counts)
        d_out, delta, total = incoming_gradients(grads[0], None, output, lse)
        # Fetched once more rather than kept: memory must not grow with the number of ranks.
        fetched = gather_needed(payload, plan, communicator, "fetch backward")
        gradients = blockwise.Gradients.zeros(query, fetched, params)
        blockwise.backward(
            ctx.spec,
            query,
            fetched,
            params,
            ctx.span,
            plan.span,
            d_out=d_out,
            total=total,
            delta=delta,
            into=gradients,
        )
        sink_gradient(ctx.spec.score, params, total, delta, gradients)
        gradients.payload = reduce_to_owner(
            gradients.payload, payload, plan, communicator, "fetch gradients"
        )
        sums = (*gradients.query, *gradients.payload, *gradients.params)
        tensor_gradients = []
        for gradient, tensor in zip(sums, tensors, strict=True):
            tensor_gradients.append(gradient.to(tensor.dtype))
        return *[None] * 7, *tensor_gradients
