"""Auto: each attention is shared in the way that sends least, chosen when its sizes are first seen.

The choice is a function of shapes, layout and mask, with each row taken for a single document: it
does not change from step to step or when a run is resumed, and every rank makes the same one
without asking.
"""

import torch
from torch import Tensor, nn

from models.masks.algebra import Mask
from models.primitives.softmax import Softmax, attention_spec, value_width
from models.scores import Tensors
from models.span import Span
from parallel.collectives import Communicator
from parallel.drivers.softmax_allgather import AllGather, needed_tokens
from parallel.drivers.softmax_ring import Ring
from parallel.drivers.softmax_ulysses import Ulysses
from parallel.drivers.softmax_usp import Usp
from parallel.sharding import SequenceSharding
from parallel.traffic import AttentionShape, TensorSpec, choose_method, tensor_spec


class Auto(nn.Module):
    """Stands in for a Softmax; at the first call it decides who drives it, and says why in
    `wire.choices`.

    Args:
        name: of the attention, for the log.
    """

    def __init__(self, core: Softmax, communicator: Communicator, name: str = "attention"):
        super().__init__()
        self.core = core
        self.communicator = communicator
        self.name = name
        self.driver: nn.Module | None = None

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
        if self.driver is None:
            self.driver = self._decide(
                query, payload, params, span, span if kv_span is None else kv_span
            )
        return self.driver(query, payload, params, span=span, kv_span=kv_span, heads=heads)

    def _decide(
        self, query: Tensors, payload: Tensors, params: Tensors, span: Span, kv_span: Span
    ) -> nn.Module:
        score = self.core.score
        communicator = self.communicator
        count = len(attention_spec(self.core.mask, score, query, None).heads)
        job = AttentionShape(
            tokens=span.pos.numel(),
            source=kv_span.pos.numel(),
            query=tuple(tensor_spec(t, dim) for t, dim in zip(query, score.query_heads)),
            payload=tuple(tensor_spec(t, dim) for t, dim in zip(payload, score.payload_heads)),
            mean=TensorSpec(
                value_width(score, payload, params, query), count, query[0].element_size()
            ),
        )
        share = remote_share(self.core.mask, span.sharding, kv_span.sharding, count)
        trade = score.query_heads[0] is not None
        method, side, why = choose_method(
            job, communicator.size, share, trade=trade, grid=communicator.heads
        )
        communicator.choices[self.name] = f"{method}: {why}"
        if method == "usp":
            return Usp(self.core, communicator.grid(side))
        return {"ring": Ring, "ulysses": Ulysses, "allgather": AllGather}[method](
            self.core, communicator
        )


def remote_share(
    mask: Mask, span: SequenceSharding, kv_span: SequenceSharding, heads: int
) -> float:
    """Part of the other ranks' keys that a rank needs, were each row one document; the most that
    rank 0 or the last needs.

    Those two need most: the last rank under a contiguous layout, rank 0 under a zigzag one. What
    was read before the row counts as the same document.
    """
    spans = [cut.line(kv_span.before()) for cut in (span, kv_span)]
    counted = torch.arange(heads)
    shares = []
    for rank in {0, span.ranks - 1}:
        others = [r for r in range(kv_span.ranks) if r != rank]
        wanted = sum(
            int(needed_tokens(mask, spans[0][rank], spans[1][r], counted).sum()) for r in others
        )
        there = sum(int(spans[1][r].valid().sum()) for r in others)
        shares.append(wanted / max(1, there))
    return max(shares)
