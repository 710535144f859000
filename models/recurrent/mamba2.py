"""Mamba-2: a state space layer as a scan with one decay per head; heads share keys and queries.

Letters: B rows, T tokens, H heads, G groups of heads, N state width, P head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.convolution.short_conv import SiluDepthwiseConv
from models.init import Rule, constant
from models.layer import Layer
from models.norms import GroupedRMSNorm
from models.primitives.scan import Scan
from models.ranges import Few, Positive
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
        groups: sets of keys and queries; they divide heads, and the gated norm norms the heads of
            each group by themselves.
        bias: of the projections into the layer and out of it.
        conv_bias: of the short convolution.
        norm_eps: added to the mean square under the gated norm.
        min_step, max_step: bounds of the time step dt; null: none above.

    Source: Dao & Gu 2024 (arXiv:2405.21060).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        state: int = 64,
        expand: Few = 2,
        conv_kernel: int = 4,
        groups: Few = 1,
        bias: bool = False,
        conv_bias: bool = False,
        norm_eps: Positive = 1e-5,
        min_step: float = 0.0,
        max_step: Positive | None = None,
    ):
        super().__init__()
        if state < 1 or expand < 1:
            raise ValueError(f"state={state}, expand={expand}: both must be 1 or more")
        if heads % groups:
            raise ValueError(
                f"groups={groups} does not divide model.heads={heads}; choose a divisor of {heads}"
            )
        if min_step < 0 or (max_step is not None and max_step < min_step):
            raise ValueError(
                f"min_step={min_step}, max_step={max_step}: time steps are above 0 and the second"
                " bound is not below the first"
            )
        inner_width = expand * width
        self.heads = heads
        self.groups = groups
        self.head_width = head_width(inner_width, heads)
        self.step_bounds = (min_step, max_step)
        self.sizes = [inner_width, groups * state, heads]
        convolved_width = inner_width + 2 * groups * state
        self.inner = nn.Linear(width, inner_width + convolved_width + heads, bias=bias)
        self.taps = SiluDepthwiseConv(convolved_width, conv_kernel, bias=conv_bias)
        self.pace = nn.Parameter(torch.empty(heads))
        self.delay = nn.Parameter(torch.empty(heads))
        self.skip = nn.Parameter(torch.empty(heads))
        self.norm = GroupedRMSNorm(inner_width, groups, eps=norm_eps)
        self.out = nn.Linear(inner_width, width, bias=bias)
        self.mix = Scan()

    def init_rules(self) -> dict[str, Rule]:
        return {"pace": paces, "delay": delays, "skip": constant(1.0)}

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        inner_width, key_width, heads = self.sizes
        parts = self.inner(x).split([inner_width, inner_width + 2 * key_width, heads], -1)
        gate, convolved, delay = parts
        value, key, query = self.taps(convolved, span).split(
            [inner_width, key_width, key_width], -1
        )
        # Time steps and decays span several orders of magnitude, which bfloat16 would merge.
        wide = torch.promote_types(x.dtype, torch.float32)
        step = F.softplus(delay.to(wide) + self.delay).clamp(*self.step_bounds)
        value = value.unflatten(-1, (heads, self.head_width))
        decay = -self.pace.to(wide).exp() * step
        payload = (self._by_head(key), value * step[..., None].to(x.dtype), decay)
        output = self.mix((self._by_head(query),), payload, span=span)
        output = (output + self.skip[:, None].to(x.dtype) * value).flatten(-2)
        return self.out(self.norm(output * F.silu(gate)))

    def _by_head(self, key: Tensor) -> Tensor:
        """[B, T, G N] -> [B, T, H, N], or [B, T, 1, N] where all heads share it."""
        key = key.unflatten(-1, (self.groups, -1))
        if self.groups == 1:
            return key
        return key.repeat_interleave(self.heads // self.groups, 2)
