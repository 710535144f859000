"""Mamba-2: a state space layer as a scan with one decay per head; heads share keys and queries.

Letters: B rows, T tokens, H heads, N state width, P head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.convolution.short_conv import SiluDepthwiseConv
from models.init import Rule, constant
from models.layer import Layer
from models.primitives.scan import Scan
from models.ranges import Few
from models.recurrent.delta import delays, paces
from models.recurrent.linear import head_width
from models.span import Span


class Mamba2(Layer):
    """S_t = exp(-pace dt) S_{t-1} + k (dt x), y = q S + skip x, a gated norm, out.

    Args:
        width: of input and output.
        heads: they divide expand * width.
        state: width of keys and queries.
        expand: inner width in units of width.
        conv_kernel: of the short convolution over values, keys and queries.

    Source: Dao & Gu 2024 (arXiv:2405.21060), with one group of keys and queries.
    """

    def __init__(
        self, width: int, heads: int, *, state: int = 64, expand: Few = 2, conv_kernel: int = 4
    ):
        super().__init__()
        if state < 1 or expand < 1:
            raise ValueError(f"state={state}, expand={expand}: both must be 1 or more")
        inner_width = expand * width
        self.heads = heads
        self.head_width = head_width(inner_width, heads)
        self.sizes = [inner_width, inner_width, state, state, heads]
        self.inner = nn.Linear(width, sum(self.sizes), bias=False)
        self.taps = SiluDepthwiseConv(inner_width + 2 * state, conv_kernel)
        self.pace = nn.Parameter(torch.empty(heads))
        self.delay = nn.Parameter(torch.empty(heads))
        self.skip = nn.Parameter(torch.empty(heads))
        self.norm = nn.RMSNorm(inner_width, eps=1e-5)
        self.out = nn.Linear(inner_width, width, bias=False)
        self.mix = Scan()

    def init_rules(self) -> dict[str, Rule]:
        return {"pace": paces, "delay": delays, "skip": constant(1.0)}

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        inner_width, _, state, _, heads = self.sizes
        parts = self.inner(x).split([inner_width, inner_width + 2 * state, heads], -1)
        gate, convolved, delay = parts
        value, key, query = self.taps(convolved, span).split([inner_width, state, state], -1)
        # Time steps and decays span several orders of magnitude, which bfloat16 would merge.
        wide = torch.promote_types(x.dtype, torch.float32)
        step = F.softplus(delay.to(wide) + self.delay)
        value = value.unflatten(-1, (heads, self.head_width))
        decay = -self.pace.to(wide).exp() * step
        payload = (key[:, :, None], value * step[..., None].to(x.dtype), decay)
        output = self.mix((query[:, :, None],), payload, span=span)
        output = (output + self.skip[:, None].to(x.dtype) * value).flatten(-2)
        return self.out(self.norm(output * F.silu(gate)))
