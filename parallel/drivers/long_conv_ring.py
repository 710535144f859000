"""Toeplitz: the input goes round, every rank adds what the arriving block gives to its own outputs.

The filter between two blocks is a Toeplitz matrix, applied by FFT. For fewer channels than ranks;
with more, Channels does each transform once and not once a rank.

Source: block overlap-add, as in StripedHyena 2 (Ku et al. 2025, arXiv:2503.01868). Ours is one
autograd function that keeps only what is local and sends the blocks round again in backward.
Letters: B rows, T local tokens, C channels, L taps.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.primitives.long_conv import LongConv
from models.scores import Tensors
from models.span import Span
from parallel.collectives import Communicator


class RingLongConv(nn.Module):
    """Stands in for a Convolution whose tokens lie over the ranks of `wire`."""

    def __init__(self, core: LongConv, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    def forward(self, payload: Tensors, params: Tensors, *, span: Span) -> Tensor:
        """As Convolution.forward, over every rank's tokens; at.cut says who holds which."""
        x, span, skip = self.core.widened(payload, params, span=span)
        return _RingLongConv.apply(self.core, self.communicator, span, x, params[0])[:, skip:]


class _RingLongConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, core: LongConv, communicator: Communicator, span: Span, x: Tensor, taps: Tensor
    ) -> Tensor:
        ctx.core = core
        ctx.communicator = communicator
        ctx.span = span
        ctx.save_for_backward(x, taps)
        wide = torch.promote_types(x.dtype, torch.float32)
        here = x
        out = x.new_zeros(x.shape, dtype=wide)
        for step in range(communicator.size):
            coming = (
                communicator.ring_shift([here], "toeplitz")
                if step < communicator.size - 1
                else None
            )
            source = span.sharding.spans[(communicator.rank - step) % communicator.size]
            out += core.partial((here.to(wide),), (taps,), span=span, kv_span=source)
            here = coming.wait()[0] if coming else here
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        core = ctx.core
        communicator = ctx.communicator
        span = ctx.span
        x, taps = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        grad = grads[0].to(wide)
        d_taps = taps.new_zeros(taps.shape, dtype=wide)

        def pull(block: Tensor, source: int) -> Tensor:
            """The gradient of a block; that of the taps is added up."""
            leaves = [
                block.to(wide).detach().requires_grad_(),
                taps.to(wide).detach().requires_grad_(),
            ]
            with torch.enable_grad():
                out = core.partial(
                    leaves[:1], leaves[1:], span=span, kv_span=span.sharding.spans[source]
                )
            d_block, d_here = torch.autograd.grad(out, leaves, grad)
            d_taps.add_(d_here)
            return d_block

        here = x
        returning = None
        coming = (
            communicator.ring_shift([here], "toeplitz backward") if communicator.size > 1 else None
        )
        for step in range(1, communicator.size):
            here = coming.wait()[0] if coming else here
            coming = (
                communicator.ring_shift([here], "toeplitz backward")
                if step < communicator.size - 1
                else None
            )
            found = pull(here, (communicator.rank - step) % communicator.size)
            if returning is not None:
                found = found + returning.wait()[0]
            returning = communicator.ring_shift([found], "toeplitz gradients")
        d_x = pull(x, communicator.rank)
        if returning is not None:
            d_x = d_x + returning.wait()[0]
        return None, None, None, d_x.to(x.dtype), d_taps.to(taps.dtype)
