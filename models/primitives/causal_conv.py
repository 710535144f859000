"""Window: the few tokens just before. A driver needs only to lend the tokens that lie before a run.

A leaf without parameters. Letters: B rows, T tokens, C channels, J taps.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.carried_state import StatefulModule
from models.primitive import Primitive
from models.scores import Tensors
from models.span import PADDING, Span


class CausalConv(Primitive, StatefulModule):
    """A causal filter per channel, y_t = sum_j taps_j x_{t-j}, that reads no other document and no
    padding.

    A token shift is the window with taps (0, 1). What is masked is replaced, not multiplied by 0.
    Where rows go on from those before (Span.past), it reads their last tokens, and nothing is
    learned through those.
    """

    def forward(self, payload: Tensors, params: Tensors, *, span: Span) -> Tensor:
        """[B, T, C].

        Args:
            payload: (x [B, T, C],).
            params: (taps [J, C],), the j-th for the token j places back.
            at: addresses of x; a token is read only if it lies just where its address says.
        """
        (taps,) = params
        x, span, skip = with_tail(self.place, payload[0], len(taps) - 1, span)
        out = taps[0] * torch.where(span.valid()[..., None], x, 0)
        for j in range(1, min(len(taps), x.shape[1])):
            out = out + taps[j] * delayed(x, span, j)
        return out[:, skip:]

    def recur(
        self, payload: Tensors, params: Tensors, *, span: Span, tail: Tensor, tail_at: Span
    ) -> tuple[Tensor, Tensor]:
        """As forward with the tokens `tail` [B, J - 1, C] just before; also gives the tail that
        comes next."""
        whole = torch.cat([tail, payload[0]], 1)
        pos, doc, role = (
            torch.cat(ends, 1) for ends in zip(*((s.pos, s.doc, s.role) for s in (tail_at, span)))
        )
        both = Span(pos, doc, role)
        skip = tail.shape[1]
        return self((whole,), params, span=both)[:, skip:], whole[:, whole.shape[1] - skip :]


def with_tail(place: str, x: Tensor, reach: int, span: Span) -> tuple[Tensor, Span, int]:
    """x with the tokens kept of the rows before in front, the addresses of both, how many they are;
    keeps the last `reach`.

    Args:
        place: name of the module that keeps them.
    """
    if span.past is None or not reach:
        return x, span, 0
    kept, kv_span = span.past.tokens(place, x, reach)
    key = "widened", id(kv_span)
    if key not in span.plans:
        span.plans[key] = kv_span, kv_span.join(span)  # `of` is kept, so that its id stays its own
    return torch.cat([kept.to(x.dtype), x], 1), span.plans[key][1], kept.shape[1]


def delayed(x: Tensor, span: Span, distance: int) -> Tensor:
    """[B, T, C]: x as it was `distance` tokens before, 0 where that is another document or
    nothing."""

    def late(y: Tensor) -> Tensor:
        return y[:, : y.shape[1] - distance]

    same = (span.doc[:, distance:] == late(span.doc)) & (
        span.pos[:, distance:] - late(span.pos) == distance
    )
    same = same & (span.doc[:, distance:] != PADDING)
    return F.pad(torch.where(same[..., None], late(x), 0), (0, 0, distance, 0))
