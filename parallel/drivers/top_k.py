"""A store that lies over ranks: entries are picked everywhere, and those that a rank's queries may see are brought to it.

What is brought is gone after use: backward brings gradients home. A search then is a rank's own business, and finds what one
device finds, because entries arrive in order of address.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.masks import Mask
from models.mixing.lookup import BlockEnds, Lookup, Picked, joint, keys, picked, take
from models.scores import Tensors
from models.span import Span
from parallel.cut import Cut
from parallel.drivers.fetch import Need, fetch, give_back, need
from parallel.layout import contiguous
from parallel.moves import Wire


class TopK(Lookup):
    """Stands in for a Lookup whose tokens lie over the ranks of `wire`; its searches are those of its parent."""

    def __init__(self, core: Lookup, wire: Wire):
        super().__init__()
        self.core, self.wire = core, wire

    def pick(self, at: Span, choose: BlockEnds) -> Picked:
        """As Lookup.pick; every rank gets equally many, so that stores may go round a ring."""
        kept = at.cut.kept
        if ("pick", choose) not in kept:
            chosen = [choose(span) for span in at.cut.spans]
            size = max(1, *(int(c.sum(1).max()) for c in chosen))
            every = [picked(span, c, size) for span, c in zip(at.cut.spans, chosen)]
            span, both = (_cut(spans, at.cut.rank) for spans in ([p.span for p in every], [p.joint for p in every]))
            kept["pick", choose] = Picked(every[at.cut.rank].index, span, both)
        return kept["pick", choose]

    def bring(self, payload: Tensors, mask: Mask, *, at: Span, of: Span) -> tuple[Tensors, Span]:
        """As Lookup.bring, over every rank's entries; at.cut and of.cut say who holds which."""
        plan = need(mask, at, of, torch.zeros(1, dtype=torch.long, device=at.pos.device))
        if torch.is_grad_enabled() and any(p.requires_grad for p in payload):
            brought = _Bring.apply(plan, self.wire, *payload)
        else:
            brought = fetch(payload, plan, self.wire, "lookup")
        order = keys(plan.span).argsort(dim=1, stable=True)
        return [take(b, order) for b in brought], plan.span.map(lambda t: t.gather(1, order))


def _cut(spans: Sequence[Span], rank: int) -> Span:
    """This rank's part of tokens whose global order is that of the ranks laid end to end."""
    whole = spans[0]
    for span in spans[1:]:
        whole = joint(whole, span)
    cut = Cut((contiguous(whole.shape[1], len(spans)),), rank, tuple(spans), whole)
    return replace(spans[rank], cut=cut, plans={})


class _Bring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Need, wire: Wire, *payload: Tensor):
        ctx.plan, ctx.wire = plan, wire
        ctx.save_for_backward(*payload)
        return tuple(fetch(payload, plan, wire, "lookup"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        payload = ctx.saved_tensors
        sums = give_back(grads, payload, ctx.plan, ctx.wire, "lookup gradients")
        return None, None, *(g.to(p.dtype) for g, p in zip(sums, payload, strict=True))
