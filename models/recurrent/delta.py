"""The delta rule: a state whose answer to each key is corrected toward the key's value.

Letters: B rows, T tokens, H heads, D head width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.convolution.short_conv import SiluDepthwiseConv
from models.init import Rule
from models.layer import Layer
from models.norms import RMSNorm
from models.primitives.scan import Scan
from models.ranges import Count, Positive
from models.recurrent.linear import head_width
from models.span import Span


class DeltaNet(Layer):
    """S_t = (1 - b k k') S_{t-1} + b k v, with unit keys and queries, short convolutions, and a
    norm per head.

    Args:
        width: of input and output.
        heads: of values; they divide width where that gives the widths of heads.
        conv_kernel: of the short convolutions.
        allow_neg_eigval: let b reach 2 instead of 1, so that a token can reflect the state (Grazzi
            et al. 2024, arXiv:2411.12537).
        key_heads: of queries and keys, each for as many heads of values; null: as many as those.
        key_width, value_width: channels of a head of keys and of values; null: width / heads.
        norm_eps: added to the mean square under the norm of heads.
        unit_eps: added to the squared length of queries and keys, which are then divided by the
            root; 0: they are divided by their length.

    Source: Schlag et al. 2021 (arXiv:2102.11174), Yang et al. 2024 (arXiv:2406.06484).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        conv_kernel: int = 4,
        allow_neg_eigval: bool = False,
        key_heads: Count | None = None,
        key_width: Count | None = None,
        value_width: Count | None = None,
        norm_eps: Positive = 1e-5,
        unit_eps: float = 0.0,
    ):
        super().__init__()
        key_heads = key_heads or heads
        if heads % key_heads:
            raise ValueError(f"key_heads={key_heads} does not divide {heads} heads of values")
        if unit_eps < 0:
            raise ValueError(f"unit_eps={unit_eps} is added to a square; use 0 to leave it out")
        if key_width is None or value_width is None:
            own_width = head_width(width, heads)
            key_width = key_width or own_width
            value_width = value_width or own_width
        self.heads = heads
        self.key_heads = key_heads
        self.key_width = key_width
        self.value_width = value_width
        self.unit_eps = unit_eps
        self.max_step = 2.0 if allow_neg_eigval else 1.0
        keys = key_heads * key_width
        values = heads * value_width
        self.q = nn.Linear(width, keys, bias=False)
        self.k = nn.Linear(width, keys, bias=False)
        self.v = nn.Linear(width, values, bias=False)
        self.out = nn.Linear(values, width, bias=False)
        self.q_taps = SiluDepthwiseConv(keys, conv_kernel)
        self.k_taps = SiluDepthwiseConv(keys, conv_kernel)
        self.v_taps = SiluDepthwiseConv(values, conv_kernel)
        self.step = nn.Linear(width, heads, bias=False)
        self.norm = RMSNorm(value_width, eps=norm_eps)
        self.mix = Scan()

    def decay(self, x: Tensor) -> Tensor:
        """Returns the log decay at every token, [B, T, 1 or H], at most 0."""
        return x.new_zeros(*x.shape[:2], 1)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        return self.out(self.read_state(x, span).flatten(-2))

    def read_state(self, x: Tensor, span: Span) -> Tensor:
        """Returns the normed answers of the state, [B, T, H, D]."""
        query = self._by_head(self.q_taps(self.q(x), span))
        key = self._by_head(self.k_taps(self.k(x), span))
        value = self.v_taps(self.v(x), span).unflatten(-1, (self.heads, -1))
        # The state is corrected once per token: errors of half precision would add up in it.
        wide = torch.promote_types(x.dtype, torch.float32)
        query = self._unit(query.to(wide)) * self.key_width**-0.5
        key = self._unit(key.to(wide))
        step = (self.max_step * self.step(x).to(wide).sigmoid())[..., None]
        decay = self.decay(x).to(wide)
        payload = (key, step * value.to(wide), decay, key * decay.exp()[..., None], -step * key)
        return self.norm(self.mix((query,), payload, span=span).to(x.dtype))

    def _by_head(self, keys: Tensor) -> Tensor:
        """[B, T, channels of all key heads] -> [B, T, H, D]."""
        keys = keys.unflatten(-1, (self.key_heads, -1))
        if self.key_heads == self.heads:
            return keys
        return keys.repeat_interleave(self.heads // self.key_heads, 2)

    def _unit(self, keys: Tensor) -> Tensor:
        """[B, T, H, D] -> [B, T, H, D] of length 1, or a little less."""
        if not self.unit_eps:
            return F.normalize(keys, dim=-1)
        return keys * (keys.square().sum(-1, keepdim=True) + self.unit_eps).rsqrt()


class GatedDeltaNet(DeltaNet):
    """S_t = g_t (1 - b k k') S_{t-1} + b k v: a decay per token before the correction, and an
    output gate.

    Args:
        as in DeltaNet.

    Source: Yang et al. 2024 (arXiv:2412.06464); its keys are narrower and its values wider than
    width, here both are as wide unless settings say otherwise (Qwen3-Next's do).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        conv_kernel: int = 4,
        allow_neg_eigval: bool = False,
        key_heads: Count | None = None,
        key_width: Count | None = None,
        value_width: Count | None = None,
        norm_eps: Positive = 1e-5,
        unit_eps: float = 0.0,
    ):
        super().__init__(
            width,
            heads,
            conv_kernel=conv_kernel,
            allow_neg_eigval=allow_neg_eigval,
            key_heads=key_heads,
            key_width=key_width,
            value_width=value_width,
            norm_eps=norm_eps,
            unit_eps=unit_eps,
        )
        self.forget = nn.Linear(width, heads, bias=False)
        self.gate = nn.Linear(width, self.v.out_features, bias=False)
        self.pace = nn.Parameter(torch.empty(heads))
        self.delay = nn.Parameter(torch.empty(heads))

    def init_rules(self) -> dict[str, Rule]:
        return {"pace": paces, "delay": delays}

    def decay(self, x: Tensor) -> Tensor:
        """Returns the log decay of each head, [B, T, H]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return -self.pace.to(wide).exp() * F.softplus(self.forget(x).to(wide) + self.delay)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        return self.out(self.read_state(x, span).flatten(-2) * F.silu(self.gate(x)))


def paces(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draws logs of uniform numbers between 1 and 16, as Mamba-2 starts its decays."""
    return (1 + 15 * torch.rand(shape, generator=generator)).log()


def delays(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draws the inverse softplus of time steps that are log-uniform between 0.001 and 0.1.

    Mamba starts its time steps so.
    """
    step = (math.log(1e-3) + math.log(100) * torch.rand(shape, generator=generator)).exp()
    return step + torch.log(-torch.expm1(-step))
