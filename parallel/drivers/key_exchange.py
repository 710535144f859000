"""Exchange of the keys that the queries of each rank see, whole or in parts.

Every rank derives from the addresses what each other rank needs, so no request is sent.

Letters: B rows, T queries, S local keys, F fetched keys of a row, P ranks.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.kernels import blockwise
from models.kernels.block_plan import PARTIAL_TILE, plan_tiles
from models.masks.algebra import Mask, visible
from models.plans import planned
from models.scores import Tensors
from models.span import PADDING, TEXT, Span, to_device
from parallel.collectives import Communicator, Pending
from parallel.key_parts import MOST_PARTS, part_count

# Parts in flight: the link has another one as soon as one has arrived.
AHEAD = 2


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
    """Returns [B, S] bool on the CPU: the keys of `kv_span` that a query of `span` sees.

    Args:
        heads: numbers of the heads, on the CPU.
    """
    needed = torch.zeros(kv_span.shape, dtype=torch.bool)
    query_host, key_host = span.host(), kv_span.host()
    for tile in plan_tiles(mask, span, kv_span):
        rows = slice(tile.r0, tile.r1)
        queries = slice(tile.q0, tile.q1)
        keys = slice(tile.k0, tile.k1)
        if tile.kind != PARTIAL_TILE:
            needed[rows, keys] = True
            continue
        tile_visible = visible(
            mask,
            _part(query_host, rows, queries),
            _part(key_host, rows, keys),
            heads,
        )
        needed[rows, keys] |= tile_visible.any(2).any(1)
    return needed


def _part(span: Span, rows: slice, tokens: slice) -> Span:
    return span.map(lambda tensor: tensor[rows, tokens])


@planned
def gather_plan(mask: Mask, span: Span, kv_span: Span, heads: Tensor) -> GatherPlan:
    """Returns the exchange that brings every rank the keys of its queries, its own among them.

    It is derived once and cached on the sharding of the queries.
    """

    def build() -> GatherPlan:
        needed_by, needed_of = _needs(mask, span, kv_span, heads.cpu())
        return _exchange(needed_by, needed_of, span, kv_span)

    return _kept("need", mask, span, kv_span, heads, build)


class GatherParts(NamedTuple):
    """The exchanges that bring the other ranks' keys, one after the other, and their addresses.

    Attributes:
        spans: those of the plans.
    """

    plans: tuple[GatherPlan, ...]
    spans: tuple[Span, ...]


@planned
def gather_parts(mask: Mask, span: Span, kv_span: Span, heads: Tensor) -> GatherParts:
    """Returns the exchanges that bring every rank the other ranks' keys of its queries, in parts.

    Each rank finds the same number of them. Cached as `gather_plan`.
    """

    def build() -> GatherParts:
        rank = span.sharding.rank
        needs = _needs(mask, span, kv_span, heads.cpu())
        count = _part_count(mask, span, kv_span, heads.cpu())
        plans = []
        for number in range(count):
            needed_by, needed_of = (
                [
                    _part_of(needed, number, count) & (other != rank)
                    for other, needed in enumerate(side)
                ]
                for side in needs
            )
            plans.append(_exchange(needed_by, needed_of, span, kv_span))
        return GatherParts(tuple(plans), tuple(plan.span for plan in plans))

    return _kept("need in parts", mask, span, kv_span, heads, build)


def _kept(
    name: str, mask: Mask, span: Span, kv_span: Span, heads: Tensor, build: Callable[[], Any]
) -> Any:
    cache = span.sharding.kept
    key = (name, mask, id(kv_span.sharding), len(heads))
    if key not in cache:
        # Holding kv_span keeps the id in the key from being reused by another object.
        cache[key] = (kv_span, build())
    return cache[key][1]


def _needs(
    mask: Mask, span: Span, kv_span: Span, heads: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns [B, S] bool for each rank: keys here that it needs, and those there needed here."""
    rank = span.sharding.rank
    needed_by = []
    for queries in span.sharding.spans:
        needed_by.append(needed_tokens(mask, queries, kv_span.sharding.spans[rank], heads))
    needed_of = []
    for keys in kv_span.sharding.spans:
        needed_of.append(needed_tokens(mask, span.sharding.spans[rank], keys, heads))
    return needed_by, needed_of


def _part_count(mask: Mask, span: Span, kv_span: Span, heads: Tensor) -> int:
    """Returns the number of parts, by what one rank needs: on every rank the same one."""
    ranks = span.sharding.ranks
    sampled = ranks // 2
    needed = 0
    for rank, keys in enumerate(kv_span.sharding.spans):
        if rank != sampled:
            of_rank = needed_tokens(mask, span.sharding.spans[sampled], keys, heads)
            needed += int(of_rank.sum(1).max())
    return part_count(needed, kv_span.pos.device.type, MOST_PARTS * max(1, ranks - 1))


def _part_of(needed: Tensor, number: int, count: int) -> Tensor:
    """Returns the part of the needed keys [B, S] that travels as so-many-th, cut along tokens."""
    through = needed.sum(0).cumsum(0)
    part = (through - 1).clamp_min(0) * count // needed.sum().clamp_min(1)
    return needed & (part == number)


def _exchange(
    needed_by: Sequence[Tensor], needed_of: Sequence[Tensor], span: Span, kv_span: Span
) -> GatherPlan:
    device = kv_span.pos.device
    key_spans = kv_span.sharding.spans
    gives = [needed.flatten().nonzero()[:, 0] for needed in needed_by]
    takes = [int(needed.sum()) for needed in needed_of]
    # Position of each needed key among those that arrive: rank by rank, then row by row.
    positions = []
    global_indices = []
    for source, needed in enumerate(needed_of):
        position = needed.flatten().cumsum(0) - 1 + sum(takes[:source])
        positions.append(position.view_as(needed))
        global_indices.append(kv_span.sharding.index(source, len(needed)))
    arrivals = torch.cat(positions, 1)
    chosen = torch.cat(list(needed_of), 1)
    # Keys that a row does not need are sorted behind all others and cut off.
    beyond = torch.iinfo(torch.int64).max
    sort_keys = torch.where(chosen, torch.cat(global_indices, 1), beyond)
    order = sort_keys.argsort(1)[:, : int(chosen.sum(1).max())]
    is_key = chosen.gather(1, order)
    place = torch.where(is_key, arrivals.gather(1, order), sum(takes))

    def fetched_addresses(field: str, fill: int) -> Tensor:
        addresses = torch.cat([getattr(remote.host(), field) for remote in key_spans], 1)
        return torch.where(is_key, addresses.gather(1, order), fill)

    fetched_span = Span(
        fetched_addresses("pos", 0),
        fetched_addresses("doc", PADDING),
        fetched_addresses("role", TEXT),
    )
    return GatherPlan(
        gives=tuple(to_device(indices, device) for indices in gives),
        takes=tuple(takes),
        place=to_device(place, device),
        span=fetched_span.moved(lambda tensor: to_device(tensor, device)),
    )


def start_gather(
    payload: Tensors, plan: GatherPlan, communicator: Communicator, name: str
) -> list[Pending]:
    """Starts fetching the keys that this rank needs, tensor by tensor."""
    pending = []
    for x in payload:
        flat = x.flatten(0, 1)
        numbers = x[0, 0].numel() if x.numel() else 0
        parts = [flat.index_select(0, indices) for indices in plan.gives]
        sizes = [count * numbers for count in plan.takes]
        pending.append(communicator.start_all_to_all(parts, sizes, name))
    return pending


def finish_gather(pending: Sequence[Pending], payload: Tensors, plan: GatherPlan) -> list[Tensor]:
    """Waits for what `start_gather` fetches: [B, F, ...], 0 in slots that a row does not need."""
    fetched = []
    for transfer, x in zip(pending, payload, strict=True):
        arrived = torch.cat(transfer.wait())
        # One row of zeros behind the last key is what unneeded slots point to.
        filler = x.new_zeros(1, *x.shape[2:])
        arrived = torch.cat([arrived.view(-1, *x.shape[2:]), filler])
        fetched.append(arrived[plan.place])
    return fetched


def gather_needed(
    payload: Tensors, plan: GatherPlan, communicator: Communicator, name: str
) -> list[Tensor]:
    """Fetches the keys that this rank needs: [B, S, ...] of every rank -> [B, F, ...].

    Slots that a row does not need are zero.
    """
    return finish_gather(start_gather(payload, plan, communicator, name), payload, plan)


def start_reduce(
    grads: Tensors, payload: Tensors, plan: GatherPlan, communicator: Communicator, name: str
) -> list[Pending]:
    """Starts sending gradients of fetched keys [B, F, ...] home, the adjoint of `start_gather`."""
    pending = []
    for gradient, x in zip(grads, payload, strict=True):
        total = sum(plan.takes)
        outgoing = gradient.new_zeros(total + 1, *x.shape[2:])
        # Every key was fetched into one slot; only the filler behind the last is written twice.
        outgoing[plan.place] = gradient
        sizes = [indices.numel() * x[0, 0].numel() for indices in plan.gives]
        parts = outgoing[:total].split(list(plan.takes))
        pending.append(communicator.start_all_to_all(parts, sizes, name))
    return pending


def finish_reduce(pending: Sequence[Pending], plan: GatherPlan, sums: Sequence[Tensor]) -> None:
    """Adds what comes home of `start_reduce` to the sums [B, S, ...], which are contiguous."""
    for transfer, total in zip(pending, sums, strict=True):
        for indices, part in zip(plan.gives, transfer.wait()):
            source = part.view(-1, *total.shape[2:]).to(total.dtype)
            total.flatten(0, 1).index_add_(0, indices, source)


def reduce_to_owner(
    grads: Tensors, payload: Tensors, plan: GatherPlan, communicator: Communicator, name: str
) -> list[Tensor]:
    """Sends gradients of fetched keys home and sums them, the adjoint of `gather_needed`.

    Args:
        grads: [B, F, ...], one for each tensor of the payload.

    Returns:
        [B, S, ...] sums over all ranks, at least in float32.
    """
    pending = start_reduce(grads, payload, plan, communicator, name)
    sums = blockwise.Gradients.zeros((), payload, ()).payload
    finish_reduce(pending, plan, sums)
    return sums


class Fetching:
    """Parts of the other ranks' keys, the next AHEAD of them in flight."""

    def __init__(
        self,
        payload: Tensors,
        plans: Sequence[GatherPlan],
        communicator: Communicator,
        name: str,
    ):
        self.payload = payload
        self.communicator = communicator
        self.name = name
        self.waiting = deque(plans)
        self.in_flight: deque[tuple[GatherPlan, list[Pending]]] = deque()
        for _ in range(AHEAD):
            self._start()

    def _start(self) -> None:
        if self.waiting:
            plan = self.waiting.popleft()
            pending = start_gather(self.payload, plan, self.communicator, self.name)
            self.in_flight.append((plan, pending))

    def take(self) -> list[Tensor]:
        """Returns the next part, and starts another."""
        plan, pending = self.in_flight.popleft()
        fetched = finish_gather(pending, self.payload, plan)
        self._start()
        return fetched


class Returning:
    """Gradients of fetched parts on their way home, at most AHEAD of them in flight."""

    def __init__(
        self,
        payload: Tensors,
        plans: Sequence[GatherPlan],
        communicator: Communicator,
        sums: Sequence[Tensor],
    ):
        self.payload = payload
        self.communicator = communicator
        self.sums = sums
        self.waiting = deque(plans)
        self.in_flight: deque[tuple[GatherPlan, list[Pending]]] = deque()

    def give(self, gradients: Tensors) -> None:
        """Starts sending the gradients of the next part."""
        plan = self.waiting.popleft()
        pending = start_reduce(gradients, self.payload, plan, self.communicator, "fetch gradients")
        self.in_flight.append((plan, pending))
        while len(self.in_flight) > AHEAD:
            self._add()

    def finish(self) -> None:
        """Waits for all that is in flight."""
        while self.in_flight:
            self._add()

    def _add(self) -> None:
        plan, pending = self.in_flight.popleft()
        finish_reduce(pending, plan, self.sums)
