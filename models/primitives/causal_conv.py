"""Short causal convolution: a filter over the few tokens just before each token.

A driver only has to lend the tokens that lie before a run. The primitive has no parameters.
Letters: B rows, T tokens, C channels, J taps.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.carried_state import StatefulModule
from models.primitive import Primitive
from models.scores import Tensors
from models.span import PADDING, Span


class CausalConv(Primitive, StatefulModule):
    """A causal filter per channel, y_t = sum_j taps_j x_{t-j}, within documents.

    A token shift is the filter with taps (0, 1). Masked tokens are replaced by 0, not multiplied by
    0. Where rows continue earlier ones (Span.past), it reads their last tokens, and no gradient
    flows through those.
    """

    continues_rows = True

    def forward(self, payload: Tensors, params: Tensors, *, span: Span) -> Tensor:
        """Returns the filtered tokens, [B, T, C].

        Args:
            payload: (x [B, T, C],).
            params: (taps [J, C],), the j-th for the token j positions back.
            span: addresses of x; an earlier token is read only if it lies at the distance that its
                address says.
        """
        (taps,) = params
        x, span, skip = with_tail(self.place, payload[0], len(taps) - 1, span)
        output = taps[0] * torch.where(span.valid()[..., None], x, 0)
        for distance in range(1, min(len(taps), x.shape[1])):
            output = output + taps[distance] * delayed(x, span, distance)
        return output[:, skip:]

    def recur(
        self, payload: Tensors, params: Tensors, *, span: Span, tail: Tensor, tail_at: Span
    ) -> tuple[Tensor, Tensor]:
        """Filters tokens that follow `tail` [B, J - 1, C]; returns (output, the next tail)."""
        whole = torch.cat([tail, payload[0]], 1)
        whole_span = Span(
            torch.cat([tail_at.pos, span.pos], 1),
            torch.cat([tail_at.doc, span.doc], 1),
            torch.cat([tail_at.role, span.role], 1),
        )
        skip = tail.shape[1]
        output = self((whole,), params, span=whole_span)[:, skip:]
        return output, whole[:, whole.shape[1] - skip :]


def with_tail(place: str, x: Tensor, reach: int, span: Span) -> tuple[Tensor, Span, int]:
    """Prepends the tokens carried over from earlier rows, and carries the last `reach` onward.

    Args:
        place: name of the module that carries them.

    Returns:
        (x [B, M + T, C], its addresses, M); unchanged and 0 where nothing is carried.
    """
    if span.past is None or not reach:
        return x, span, 0
    tail, tail_span = span.past.tokens(place, x, reach)
    if not tail.shape[1]:
        return x, span, 0
    whole_span = span.cache.get("widened", lambda: tail_span.join(span), tail_span)
    return torch.cat([tail.to(x.dtype), x], 1), whole_span, tail.shape[1]


def delayed(x: Tensor, span: Span, distance: int) -> Tensor:
    """Returns x as it was `distance` tokens earlier, [B, T, C].

    0 where that token belongs to another document, is padding, or does not exist.
    """
    earlier = span.shape[1] - distance
    later_doc = span.doc[:, distance:]
    later_pos = span.pos[:, distance:]
    same_document = later_doc == span.doc[:, :earlier]
    # A memory may leave gaps between neighbours of one document: the address decides.
    adjacent = later_pos - span.pos[:, :earlier] == distance
    same = same_document & adjacent & (later_doc != PADDING)
    shifted = torch.where(same[..., None], x[:, :earlier], 0)
    return F.pad(shifted, (0, 0, distance, 0))
