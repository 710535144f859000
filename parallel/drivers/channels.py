"""Channels: trade channels for tokens, convolve the whole row, trade back.

A convolution is depthwise, so a rank needs all tokens but only its share of the channels and of the filter.
Letters: B rows, T local tokens, C channels, L taps.
"""

from torch import Tensor, nn

from models.mixing.convolution import Convolution
from models.scores import Tensors
from models.span import Span
from parallel.drivers.passing import units
from parallel.drivers.toeplitz import Toeplitz
from parallel.moves import Wire, collect, deal


class Channels(nn.Module):
    """Stands in for a Convolution whose tokens lie over the ranks of `wire`; fewer channels than ranks go by Toeplitz."""

    def __init__(self, core: Convolution, wire: Wire):
        super().__init__()
        self.core, self.wire = core, wire

    def forward(self, payload: Tensors, params: Tensors, *, at: Span) -> Tensor:
        """As Convolution.forward over the whole rows; at.cut says who holds which."""
        (taps,) = params
        if payload[0].shape[2] < self.wire.size:
            return Toeplitz(self.core, self.wire)(payload, params, at=at)
        x, at, skip = self.core.widened(payload, params, at=at)
        shares = units(x.shape[2], self.wire.size)
        a, b = shares[self.wire.rank]
        whole = at.cut.joined(deal(x, self.wire, 2, shares))
        out = self.core((whole,), (taps[:, a:b],), at=at.cut.whole)
        return collect(at.cut.parted(out), self.wire, 2, shares)[:, skip:]
