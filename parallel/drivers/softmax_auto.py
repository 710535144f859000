"""Auto driver of Softmax: chooses for each attention the method that sends the fewest bytes.

The choice is made at the first call. It is a function of shapes, layout and mask, with each row
taken for a single document: it does not change from step to step or when a run is resumed, and
every rank makes the same one without communication.
"""

import torch
from torch import Tensor, nn

from models.masks.algebra import Mask
from models.primitives.softmax import Softmax, attention_spec, value_width
from models.scores import Tensors
from models.span import Span
from parallel.collectives import Communicator
from parallel.drivers.key_exchange import needed_tokens
from parallel.drivers.softmax_allgather import AllGather
from parallel.drivers.softmax_ring import Ring
from parallel.drivers.softmax_ulysses import Ulysses
from parallel.drivers.softmax_usp import Usp
from parallel.sharding import SequenceSharding
from parallel.traffic import AttentionShape, TensorSpec, choose_method, tensor_spec


class Auto(nn.Module):
    """Replaces a Softmax; selects its driver at the first call.

    Args:
        name: name of the attention in `communicator.choices`, where the reason is recorded.
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
        """Runs Softmax.forward over every rank's keys.

        `span.sharding` (and `kv_span.sharding`) say which rank holds which tokens.
        """
        if span.sharding is None:  # every rank has these tokens: one step of decoding
            return self.core(query, payload, params, span=span, kv_span=kv_span, heads=heads)
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
    """Returns the share of the other ranks' keys that a rank needs.

    It is the larger of the shares of rank 0 and the last rank, for rows of one document each. Those
    two need most: the last rank under a contiguous layout, rank 0 under a zigzag one. Tokens read
    before the row count as the same document.
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
