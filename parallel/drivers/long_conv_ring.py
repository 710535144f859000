"""Ring driver of LongConv: inputs rotate, every rank adds each block's part of its own outputs.

The filter between two blocks is a Toeplitz matrix, applied by FFT. Meant for fewer channels than
ranks; with more, ChannelAllToAll does each transform once instead of once per rank.

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
    """Replaces a LongConv whose tokens are sharded over the ranks of `communicator`."""

    def __init__(self, core: LongConv, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    def forward(self, payload: Tensors, params: Tensors, *, span: Span) -> Tensor:
        """Runs LongConv.forward over every rank's tokens.

        `span.sharding` says which rank holds which tokens.
        """
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
        dtype = torch.promote_types(x.dtype, torch.float32)
        block = x
        output = x.new_zeros(x.shape, dtype=dtype)
        for step in range(communicator.size):
            # The next block travels while this one is computed.
            pending = None
            if step < communicator.size - 1:
                pending = communicator.ring_shift([block], "toeplitz")
            source = span.sharding.spans[(communicator.rank - step) % communicator.size]
            output += core.partial((block.to(dtype),), (taps,), span=span, kv_span=source)
            if pending is not None:
                block = pending.wait()[0]
        return output.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        core = ctx.core
        communicator = ctx.communicator
        span = ctx.span
        x, taps = ctx.saved_tensors
        dtype = torch.promote_types(x.dtype, torch.float32)
        d_output = grads[0].to(dtype)
        d_taps = taps.new_zeros(taps.shape, dtype=dtype)

        def block_gradient(block: Tensor, source: int) -> Tensor:
            """Returns the gradient of a block and adds that of the taps to `d_taps`."""
            block_leaf = block.to(dtype).detach().requires_grad_()
            taps_leaf = taps.to(dtype).detach().requires_grad_()
            kv_span = span.sharding.spans[source]
            with torch.enable_grad():
                output = core.partial([block_leaf], [taps_leaf], span=span, kv_span=kv_span)
            d_block, d_taps_part = torch.autograd.grad(output, [block_leaf, taps_leaf], d_output)
            d_taps.add_(d_taps_part)
            return d_block

        block = x
        returning = None
        pending = None
        if communicator.size > 1:
            pending = communicator.ring_shift([block], "toeplitz backward")
        # A rank's own block comes last, so that gradients come home after size - 1 hops.
        for step in range(1, communicator.size):
            if pending is not None:
                block = pending.wait()[0]
            pending = None
            if step < communicator.size - 1:
                pending = communicator.ring_shift([block], "toeplitz backward")
            d_block = block_gradient(block, (communicator.rank - step) % communicator.size)
            if returning is not None:
                d_block = d_block + returning.wait()[0]
            returning = communicator.ring_shift([d_block], "toeplitz gradients")
        d_x = block_gradient(x, communicator.rank)
        if returning is not None:
            d_x = d_x + returning.wait()[0]
        return None, None, None, d_x.to(x.dtype), d_taps.to(taps.dtype)
