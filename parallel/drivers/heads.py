"""Heads (Ulysses): trade tokens for heads, attend to the whole row, trade back.

Source: Jacobs et al. 2023 (arXiv:2309.14509). Ours takes head counts that the ranks do not divide, sends a key head to every
rank that needs it where there are more ranks than key heads, and hands masks and scores the global head numbers.

Letters: B rows, c local tokens, P ranks, H query heads, E value width.
"""

import torch
from torch import Tensor, nn

from models.mixing.softmax import Softmax
from models.scores import Tensors
from models.span import Span
from parallel.cut import Cut, Group
from parallel.drivers.ring import Ring
from parallel.moves import Heads as Share
from parallel.moves import Wire, collect, deal


def shares(heads: int, ranks: int) -> list[Share]:
    """For each rank the query heads it computes: as equal as can be.

    Raises:
        ValueError: fewer heads than ranks.
    """
    if heads < ranks:
        raise ValueError(f"parallel.method=heads over {ranks} ranks needs {ranks} query heads, there are {heads}; use ring")
    edges = [r * heads // ranks for r in range(ranks + 1)]
    return list(zip(edges[:-1], edges[1:]))


class Heads(nn.Module):
    """Stands in for a Softmax whose tokens lie over the ranks of `wire`.

    Args:
        core: what attends, to the tokens of all ranks of the wire.
    """

    def __init__(self, core: Softmax | Ring, wire: Wire):
        super().__init__()
        self.core, self.wire = core, wire

    def row(self, span: Span) -> Cut | Group:
        """What the ranks of the wire hold together."""
        return span.cut

    def forward(
        self,
        query: Tensors,
        payload: Tensors,
        params: Tensors = (),
        *,
        at: Span,
        of: Span | None = None,
        heads: Tensor | None = None,
    ) -> Tensor:
        """As Softmax.forward, over every rank's keys; at.cut (and of.cut) say who holds which."""
        score, (here, there) = self.core.score, (self.row(at), self.row(at if of is None else of))
        counted = score.query_heads[0]
        if counted is None:
            raise ValueError("parallel.method=heads needs a score whose queries have heads; use ring")
        count = query[0].shape[counted]
        mine = shares(count, self.wire.size)
        a, b = mine[self.wire.rank]
        query = [here.joined(self._deal(t, dim, count)[0]) for t, dim in zip(query, score.query_heads, strict=True)]
        arrived = [self._deal(t, dim, count) for t, dim in zip(payload, score.payload_heads, strict=True)]
        payload = [there.joined(t) for t in _aligned(arrived, score.payload_heads, b - a)]
        params = [p if dim is None else p.narrow(dim, a, b - a) for p, dim in zip(params, score.param_heads, strict=True)]
        numbers = torch.arange(count, device=query[0].device) if heads is None else heads
        mean = self.core(query, payload, params, at=here.whole, of=there.whole, heads=numbers[a:b])
        return collect(here.parted(mean), self.wire, 2, mine)

    def _deal(self, x: Tensor, dim: int | None, count: int) -> tuple[Tensor, Tensor | None]:
        """x of the whole row with the heads that this rank's queries need, and which of them each query head reads."""
        mine = shares(count, self.wire.size)
        if dim is None:
            return deal(x, self.wire, None, mine), None
        share = count // x.shape[dim]  # query heads to a head of x
        a, b = mine[self.wire.rank]
        needed = [(first // share, (last - 1) // share + 1) for first, last in mine]
        reads = torch.arange(a, b, device=x.device) // share - needed[self.wire.rank][0]
        return deal(x, self.wire, dim, needed), reads


def _aligned(arrived: list[tuple[Tensor, Tensor | None]], dims: tuple[int | None, ...], heads: int) -> list[Tensor]:
    """Repeat key heads where the query heads at hand do not fall into equal groups; all tensors get as many."""
    counts = [t.shape[dim] for (t, _), dim in zip(arrived, dims) if dim is not None]
    even = all(
        reads is None or (heads % n == 0 and torch.equal(reads, torch.arange(heads, device=reads.device) // (heads // n)))
        for (_, reads), n in zip([x for x in arrived if x[1] is not None], counts)
    )
    if even and len(set(counts)) <= 1:
        return [t for t, _ in arrived]
    return [t if dim is None or reads is None else t.index_select(dim, reads) for (t, reads), dim in zip(arrived, dims)]
