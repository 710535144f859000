"""Channels: trade channels for tokens, convolve the whole row, trade back.

A convolution is depthwise, so a rank needs all tokens but only its share of the channels and of the
filter.
Letters: B rows, T local tokens, C channels, L taps.
"""

from torch import Tensor, nn

from models.primitives.long_conv import LongConv
from models.scores import Tensors
from models.span import Span
from parallel.collectives import Communicator, heads_to_seq, seq_to_heads
from parallel.drivers.long_conv_ring import RingLongConv
from parallel.partition import unit_ranges


class ChannelAllToAll(nn.Module):
    """Stands in for a Convolution whose tokens lie over the ranks of `wire`; fewer channels than
    ranks go by Toeplitz."""

    def __init__(self, core: LongConv, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    def forward(self, payload: Tensors, params: Tensors, *, span: Span) -> Tensor:
        """As Convolution.forward over the whole rows; at.cut says who holds which."""
        (taps,) = params
        if payload[0].shape[2] < self.communicator.size:
            return RingLongConv(self.core, self.communicator)(payload, params, span=span)
        x, span, skip = self.core.widened(payload, params, span=span)
        shares = unit_ranges(x.shape[2], self.communicator.size)
        a, b = shares[self.communicator.rank]
        whole = span.sharding.to_global_order(seq_to_heads(x, self.communicator, 2, shares))
        out = self.core((whole,), (taps[:, a:b],), span=span.sharding.whole)
        return heads_to_seq(span.sharding.to_rank_order(out), self.communicator, 2, shares)[
            :, skip:
        ]
