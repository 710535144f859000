"""Channel all-to-all driver of LongConv: trades tokens for channels, convolves whole rows.

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
    """Replaces a LongConv whose tokens are sharded over the ranks of `communicator`.

    With fewer channels than ranks it falls back to RingLongConv.
    """

    def __init__(self, core: LongConv, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    def forward(self, payload: Tensors, params: Tensors, *, span: Span) -> Tensor:
        """Runs LongConv.forward over the whole rows.

        `span.sharding` says which rank holds which tokens.
        """
        if span.sharding is None:  # every rank has these tokens: one step of decoding
            return self.core(payload, params, span=span)
        (taps,) = params
        if payload[0].shape[2] < self.communicator.size:
            return RingLongConv(self.core, self.communicator)(payload, params, span=span)
        x, span, skip = self.core.widened(payload, params, span=span)
        ranges = unit_ranges(x.shape[2], self.communicator.size)
        first, last = ranges[self.communicator.rank]
        traded = seq_to_heads(x, self.communicator, 2, ranges)
        whole = span.sharding.to_global_order(traded)
        output = self.core((whole,), (taps[:, first:last],), span=span.sharding.whole)
        output = span.sharding.to_rank_order(output)
        # The first tokens are those carried from earlier rows; their outputs are not asked for.
        return heads_to_seq(output, self.communicator, 2, ranges)[:, skip:]
