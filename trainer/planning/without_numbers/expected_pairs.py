"""Expected choices of attention over chosen pairs, for a plan whose tensors hold no numbers.

The code of models/kernels/pairs runs as it is; the few numbers that it reads are put in their place
here. LSH: hashes that spread tokens evenly are drawn for one head, and the tiles of all heads are
as wide as that one's. Compressed attention: every query chooses as many blocks as it can, spread
evenly over its document.

Of many groups of blocks a few are taken, and the others cost as much as those beside them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from models.attention.lsh import BucketCount, BucketScore
from models.kernels.pairs import readings
from models.kernels.pairs.block_lookup import BlockLookup
from models.kernels.pairs.bucket_pairs import BucketPairs
from models.primitives import block_topk
from models.span import Span
from trainer.planning.devices import Device
from trainer.planning.step_costs import StepCosts

FEW = 6  # groups that are taken
SPREAD = 3  # standard deviations by which the most exceeds the mean, of many draws
SEED = 0

Group = TypeVar("Group")


@contextmanager
def expected_pairs(costs: StepCosts, device: Device) -> Iterator[None]:
    """Has chosen pairs computed without numbers.

    Args:
        costs: receives the costs of groups that are left out.
        device: that the run is planned for.
    """
    plan = _Expected(costs, device)
    plain = {name: getattr(readings, name) for name in plan.readings}
    pairs = BucketScore.pairs
    chunk = block_topk.CHUNK_SCORES_CPU
    for name, reading in plan.readings.items():
        setattr(readings, name, reading)
    setattr(BucketScore, "pairs", plan.drawn_first(pairs))  # noqa: B010
    if device.kind == "cuda":
        block_topk.CHUNK_SCORES_CPU = block_topk.CHUNK_SCORES
    try:
        yield
    finally:
        for name, reading in plain.items():
            setattr(readings, name, reading)
        setattr(BucketScore, "pairs", pairs)  # noqa: B010
        block_topk.CHUNK_SCORES_CPU = chunk


class _Expected:
    """The readings of one plan."""

    def __init__(self, costs: StepCosts, device: Device):
        self.costs = costs
        self.kind = device.kind
        self.widths: Iterator[list[int]] = iter(())
        self.drawn: dict[Any, list[list[int]]] = {}
        self.plain_counts = readings.counts_of
        names = ("has_numbers", "scores_together", "widths_of", "counts_of", "visited")
        self.readings = {name: getattr(self, name) for name in names}

    def has_numbers(self, tensors: Any) -> bool:
        """See readings.has_numbers: what is read of them is expected."""
        return not any(tensor.is_meta for tensor in tensors)

    def scores_together(self, device: torch.device) -> int:
        """See readings.scores_together; `device` is not the one that is planned for."""
        return readings.SCORES.get(self.kind, readings.MANY_SCORES)

    def widths_of(self, widths: Tensor) -> list[int]:
        """See readings.widths_of."""
        if not isinstance(widths, FakeTensor):
            return widths.tolist()
        drawn = next(self.widths)
        lines = len(widths) // len(drawn)
        return [width for width in drawn for _ in range(lines)]

    def counts_of(
        self, counts: Tensor, asked: int, lookup: BlockLookup, part: slice
    ) -> tuple[int, int]:
        """See readings.counts_of."""
        if not isinstance(counts, FakeTensor):
            return self.plain_counts(counts, asked, lookup, part)
        with _disable_current_modes():
            here = _blocks_at_hand(lookup, part)
            every = lookup.complete[:, part].double()
            share = (here / every.clamp_min(1)).clamp_max(1)
            chosen = every.clamp_max(asked)
            spread = SPREAD * (chosen * share * (1 - share)).sqrt()
            fewest = (chosen * share - spread).floor().clamp_min(0).min()
            most = torch.minimum((chosen * share + spread).ceil(), torch.minimum(chosen, here))
            return int(fewest), int(most.max())

    def drawn_first(self, pairs: Any) -> Any:
        """Returns `BucketScore.pairs` that says beforehand how wide the tiles of hashes are."""

        def drawn(
            score: BucketScore, mask: Any, query: Any, payload: Any, *spans: Span, **options: Any
        ) -> Any:
            if isinstance(query[1], FakeTensor):
                with _disable_current_modes():
                    self.widths = iter(self._drawn(score.count, *spans))
            return pairs(score, mask, query, payload, *spans, **options)

        return drawn

    def _drawn(self, count: BucketCount, span: Span, kv_span: Span) -> list[list[int]]:
        """As `_drawn_widths`, once for all layers; rows are taken to be alike."""
        lines = [addresses.map(lambda numbers: numbers[:1]) for addresses in (span, kv_span)]
        key = count, *(line.pos.numpy().tobytes() + line.doc.numpy().tobytes() for line in lines)
        if key not in self.drawn:
            self.drawn[key] = _drawn_widths(count, *lines)
        return self.drawn[key]

    def visited(self, groups: Sequence[Group]) -> Iterator[Group]:
        """See readings.visited."""
        if len(groups) <= FEW:
            yield from groups
            return
        edges = [len(groups) * index // FEW for index in range(FEW + 1)]
        for low, high in pairwise(edges):
            before = self.costs.copy()
            yield groups[(low + high) // 2]
            after = self.costs.copy()
            self.costs.add(after, high - low - 1)
            self.costs.add(before, low + 1 - high)


def _blocks_at_hand(lookup: BlockLookup, part: slice) -> Tensor:
    """[B, t] complete blocks of the query's document among the keys."""
    filled = (lookup.table >= 0).cumsum(0)
    before = torch.cat([filled.new_zeros(1), filled])
    low = (lookup.lowest + lookup.shift)[:, part, 0]
    high = (lookup.highest + lookup.shift)[:, part, 0] + 1
    sees = high > low
    found = before[torch.where(sees, high, 0)] - before[torch.where(sees, low, 0)]
    return found.double()


def _drawn_widths(count: BucketCount, span: Span, kv_span: Span) -> list[list[int]]:
    """Returns for each hash the widths of the tiles of one head, the widest first.

    Args:
        count: says how many hashes and buckets there are.
        span, kv_span: addresses [1, T] of queries and [1, S] of keys.
    """
    longest = int(torch.cat([span.pos, kv_span.pos], 1).max()) + 1
    generator = torch.Generator().manual_seed(SEED)
    buckets = torch.randint(count.buckets, (longest, count.hashes), generator=generator)
    # As LSHAttention.places: a token's place is the number of earlier ones in its bucket.
    ordered, order = buckets.sort(dim=0, stable=True)
    index = torch.arange(longest)[:, None].expand_as(order)
    opens = torch.ones_like(ordered, dtype=torch.bool)
    opens[1:] = ordered[1:] != ordered[:-1]
    begin = torch.where(opens, index, 0).cummax(0).values
    chunks = torch.empty_like(order).scatter_(0, order, index - begin) // count.chunk_size

    def numbers(addresses: Span) -> tuple[Tensor, Tensor]:
        pos = addresses.pos[0].clamp_min(0)
        return buckets[pos][None, :, None], chunks[pos][None, :, None]

    pairs = BucketPairs(
        numbers(span), numbers(kv_span), span, kv_span, alone=0, most=1, dtype=torch.float32
    )
    found: list[list[int]] = []

    def recorded(widths: Tensor) -> list[int]:
        found.append(widths.tolist())
        return []

    reading = readings.widths_of
    readings.widths_of = recorded
    try:
        for _ in pairs.blocks():
            raise AssertionError("no tile is left to compute")
    finally:
        readings.widths_of = reading
    return found
