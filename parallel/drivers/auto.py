"""Auto: each attention is shared in the way that sends least, chosen when its sizes are first seen.

The choice is a function of shapes, layout and mask, with each row taken for a single document: it does not change from step
to step or when a run is resumed, and every rank makes the same one without asking.
"""

import torch
from torch import Tensor, nn

from models.masks import Mask
from models.mixing.softmax import Softmax, attention, value_width
from models.scores import Tensors
from models.span import Span
from parallel.cost import Job, Stream, choose, stream
from parallel.cut import Cut
from parallel.drivers.fetch import Fetch, needed
from parallel.drivers.heads import Heads
from parallel.drivers.ring import Ring
from parallel.drivers.usp import Usp
from parallel.moves import Wire


class Auto(nn.Module):
    """Stands in for a Softmax; at the first call it decides who drives it, and says why in `wire.choices`.

    Args:
        name: of the attention, for the log.
    """

    def __init__(self, core: Softmax, wire: Wire, name: str = "attention"):
        super().__init__()
        self.core, self.wire, self.name = core, wire, name
        self.driver: nn.Module | None = None

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
        if self.driver is None:
            self.driver = self._decide(query, payload, params, at, at if of is None else of)
        return self.driver(query, payload, params, at=at, of=of, heads=heads)

    def _decide(self, query: Tensors, payload: Tensors, params: Tensors, at: Span, of: Span) -> nn.Module:
        score, wire = self.core.score, self.wire
        count = len(attention(self.core.mask, score, query, None).heads)
        job = Job(
            tokens=at.pos.numel(),
            source=of.pos.numel(),
            query=tuple(stream(t, dim) for t, dim in zip(query, score.query_heads)),
            payload=tuple(stream(t, dim) for t, dim in zip(payload, score.payload_heads)),
            mean=Stream(value_width(score, payload, params, query), count, query[0].element_size()),
        )
        share = remote_share(self.core.mask, at.cut, of.cut, count)
        trade = score.query_heads[0] is not None
        method, side, why = choose(job, wire.size, share, trade=trade, grid=wire.heads)
        wire.choices[self.name] = f"{method}: {why}"
        if method == "usp":
            return Usp(self.core, wire.grid(side))
        return {"ring": Ring, "heads": Heads, "fetch": Fetch}[method](self.core, wire)


def remote_share(mask: Mask, at: Cut, of: Cut, heads: int) -> float:
    """Part of the other ranks' keys that a rank needs, were each row one document; the most that rank 0 or the last needs.

    Those two need most: the last rank under a contiguous layout, rank 0 under a zigzag one. What was read before the row
    counts as the same document.
    """
    spans = [cut.line(of.before()) for cut in (at, of)]
    counted = torch.arange(heads)
    shares = []
    for rank in {0, at.ranks - 1}:
        others = [r for r in range(of.ranks) if r != rank]
        wanted = sum(int(needed(mask, spans[0][rank], spans[1][r], counted).sum()) for r in others)
        there = sum(int(spans[1][r].valid().sum()) for r in others)
        shares.append(wanted / max(1, there))
    return max(shares)
