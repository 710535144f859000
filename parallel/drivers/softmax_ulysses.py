"""Heads (Ulysses): trade tokens for heads, attend to the whole row, trade back.

Source: Jacobs et al. 2023 (arXiv:2309.14509). Ours takes head counts that the ranks do not divide,
sends a key head to every rank that needs it where there are more ranks than key heads, and hands
masks and scores the global head numbers.

Letters: B rows, c local tokens, P ranks, H query heads, E value width.
"""

import torch
from torch import Tensor, nn

from models.primitives.softmax import Softmax
from models.scores import Tensors
from models.span import Span
from parallel.collectives import Communicator, heads_to_seq, seq_to_heads
from parallel.drivers.softmax_ring import Ring
from parallel.partition import head_ranges
from parallel.sharding import RankGroup, SequenceSharding


class Ulysses(nn.Module):
    """Stands in for a Softmax whose tokens lie over the ranks of `wire`.

    Args:
        core: what attends, to the tokens of all ranks of the wire.
    """

    def __init__(self, core: Softmax | Ring, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    def row(self, span: Span) -> SequenceSharding | RankGroup:
        """What the ranks of the wire hold together."""
        return span.sharding

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
        """As Softmax.forward, over every rank's keys; at.cut (and of.cut) say who holds which."""
        score = self.core.score
        here, there = (self.row(span), self.row(span if kv_span is None else kv_span))
        counted = score.query_heads[0]
        if counted is None:
            raise ValueError(
                "parallel.method=ulysses needs a score whose queries have heads; use ring"
            )
        count = query[0].shape[counted]
        mine = head_ranges(count, self.communicator.size)
        a, b = mine[self.communicator.rank]
        query = [
            here.to_global_order(self._deal(t, dim, count)[0])
            for t, dim in zip(query, score.query_heads, strict=True)
        ]
        arrived = [
            self._deal(t, dim, count) for t, dim in zip(payload, score.payload_heads, strict=True)
        ]
        payload = [
            there.to_global_order(t) for t in _align_heads(arrived, score.payload_heads, b - a)
        ]
        params = [
            p if dim is None else p.narrow(dim, a, b - a)
            for p, dim in zip(params, score.param_heads, strict=True)
        ]
        numbers = torch.arange(count, device=query[0].device) if heads is None else heads
        mean = self.core(
            query, payload, params, span=here.whole, kv_span=there.whole, heads=numbers[a:b]
        )
        return heads_to_seq(here.to_rank_order(mean), self.communicator, 2, mine)

    def _deal(self, x: Tensor, dim: int | None, count: int) -> tuple[Tensor, Tensor | None]:
        """x of the whole row with the heads that this rank's queries need, and which of them each
        query head reads."""
        mine = head_ranges(count, self.communicator.size)
        if dim is None:
            return seq_to_heads(x, self.communicator, None, mine), None
        share = count // x.shape[dim]  # query heads to a head of x
        a, b = mine[self.communicator.rank]
        needed = [(first // share, (last - 1) // share + 1) for first, last in mine]
        reads = torch.arange(a, b, device=x.device) // share - needed[self.communicator.rank][0]
        return seq_to_heads(x, self.communicator, dim, needed), reads


def _align_heads(
    arrived: list[tuple[Tensor, Tensor | None]], dims: tuple[int | None, ...], heads: int
) -> list[Tensor]:
    """Repeat key heads where the query heads at hand do not fall into equal groups; all tensors get
    as many."""
    counts = [t.shape[dim] for (t, _), dim in zip(arrived, dims) if dim is not None]
    even = all(
        reads is None
        or (
            heads % n == 0
            and torch.equal(reads, torch.arange(heads, device=reads.device) // (heads // n))
        )
        for (_, reads), n in zip([x for x in arrived if x[1] is not None], counts)
    )
    if even and len(set(counts)) <= 1:
        return [t for t, _ in arrived]
    return [
        t if dim is None or reads is None else t.index_select(dim, reads)
        for (t, reads), dim in zip(arrived, dims)
    ]
