"""Driver of BlockTopK: fetches the entries of a sharded store that a rank's queries may see.

Fetched entries are dropped after use, and backward sends their gradients home. The search itself is
local and finds what one device finds, because entries arrive in order of address.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.masks.algebra import Mask
from models.plans import planned
from models.primitives.block_topk import (
    BlockEnds,
    BlockTopK,
    PickedBlocks,
    joint,
    keys,
    picked_blocks,
    take,
)
from models.scores import Tensors
from models.span import Span
from parallel.collectives import Communicator
from parallel.drivers.key_exchange import (
    GatherPlan,
    gather_needed,
    gather_plan,
    reduce_to_owner,
)
from parallel.layout import contiguous
from parallel.sharding import SequenceSharding


class ShardedBlockTopK(BlockTopK):
    """Replaces a BlockTopK whose tokens are sharded over the ranks of `communicator`.

    The search is inherited.
    """

    def __init__(self, core: BlockTopK, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    @planned
    def pick(self, span: Span, choose: BlockEnds) -> PickedBlocks:
        """Runs BlockTopK.pick; all ranks get the same number, so that a ring is possible."""
        if span.sharding is None:  # every rank has these tokens: one step of decoding
            return self.core.pick(span, choose)
        kept = span.sharding.kept
        if ("pick", choose) not in kept:
            chosen = [choose(inner_span) for inner_span in span.sharding.spans]
            size = max(1, *(int(c.sum(1).max()) for c in chosen))
            every = [
                picked_blocks(inner_span, c, size)
                for inner_span, c in zip(span.sharding.spans, chosen)
            ]
            inner_span, both = (
                _cut(spans, span.sharding.rank)
                for spans in ([p.span for p in every], [p.joint for p in every])
            )
            kept["pick", choose] = PickedBlocks(every[span.sharding.rank].index, inner_span, both)
        return kept["pick", choose]

    def bring(
        self, payload: Tensors, mask: Mask, *, span: Span, kv_span: Span
    ) -> tuple[Tensors, Span]:
        """Runs BlockTopK.bring over every rank's entries.

        `span.sharding` and `kv_span.sharding` say which rank holds which tokens.
        """
        past = span.past or kv_span.past
        if past is not None and past.continues_rows:
            if kv_span.sharding is None:  # every rank has these tokens: one step of decoding
                return self.core.bring(payload, mask, span=span, kv_span=kv_span)
            payload, kv_span = past.extend(self.core.place, payload, kv_span, mask, shared=True)
        plan = gather_plan(
            mask, span, kv_span, torch.zeros(1, dtype=torch.long, device=span.pos.device)
        )
        if torch.is_grad_enabled() and any(p.requires_grad for p in payload):
            brought = _GatherBlocks.apply(plan, self.communicator, *payload)
        else:
            brought = gather_needed(payload, plan, self.communicator, "lookup")
        order = keys(plan.span).argsort(dim=1, stable=True)
        return [take(b, order) for b in brought], plan.span.map(lambda t: t.gather(1, order))


def _cut(spans: Sequence[Span], rank: int) -> Span:
    """Returns this rank's part of tokens whose global order is the ranks' tokens end to end."""
    whole = spans[0]
    for span in spans[1:]:
        whole = joint(whole, span)
    cut = SequenceSharding((contiguous(whole.shape[1], len(spans)),), rank, tuple(spans), whole)
    return spans[rank].with_sharding(cut)


class _GatherBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: GatherPlan, communicator: Communicator, *payload: Tensor):
        ctx.plan = plan
        ctx.communicator = communicator
        ctx.save_for_backward(*payload)
        return tuple(gather_needed(payload, plan, communicator, "lookup"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        payload = ctx.saved_tensors
        sums = reduce_to_owner(grads, payload, ctx.plan, ctx.communicator, "lookup gradients")
        return None, None, *(g.to(p.dtype) for g, p in zip(sums, payload, strict=True))
