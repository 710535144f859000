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
from models.primitives.scan import Scan
from models.recurrent.linear import head_width
from models.span import Span


class DeltaNet(Layer):
    """S_t = (1 - b k k') S_{t-1} + b k v, with unit keys and queries, short convolutions, and a
    norm per head.

    Args:
        width: of input and output.
        heads: they divide width.
        conv_kernel: of the short convolutions.
        allow_neg_eigval: let b reach 2 instead of 1, so that a token can reflect the state (Grazzi
            et al. 2024, arXiv:2411.12537).

    Source: Schlag et al. 2021 (arXiv:2102.11174), Yang et al. 2024 (arXiv:2406.06484).
    """

    def __init__(
        self, width: int, heads: int, *, conv_kernel: int = 4, allow_neg_eigval: bool = False
    ):
        super().__init__()
        self.heads = heads
        self.head_width = head_width(width, heads)
        self.max_step = 2.0 if allow_neg_eigval else 1.0
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.q_taps = SiluDepthwiseConv(width, conv_kernel)
        self.k_taps = SiluDepthwiseConv(width, conv_kernel)
        self.v_taps = SiluDepthwiseConv(width, conv_kernel)
        self.step = nn.Linear(width, heads, bias=False)
        self.norm = nn.RMSNorm(self.head_width, eps=1e-5)
        self.mix = Scan()

    def decay(self, x: Tensor) -> Tensor:
        """Returns the log decay at every token, [B, T, 1 or H], at most 0."""
        return x.new_zeros(*x.shape[:2], 1)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        return self.out(self.read_state(x, span).flatten(-2))

    def read_state(self, x: Tensor, span: Span) -> Tensor:
        """Returns the normed answers of the state, [B, T, H, D]."""
        heads = (self.heads, -1)
        query = self.q_taps(self.q(x), span).unflatten(-1, heads)
        key = self.k_taps(self.k(x), span).unflatten(-1, heads)
        value = self.v_taps(self.v(x), span).unflatten(-1, heads)
        # The state is corrected once per token: errors of half precision would add up in it.
        wide = torch.promote_types(x.dtype, torch.float32)
        query = F.normalize(query.to(wide), dim=-1) * self.head_width**-0.5
        key = F.normalize(key.to(wide), dim=-1)
        step = (self.max_step * self.step(x).to(wide).sigmoid())[..., None]
        decay = self.decay(x).to(wide)
        payload = (key, step * value.to(wide), decay, key * decay.exp()[..., None], -step * key)
        return self.norm(self.mix((query,), payload, span=span).to(x.dtype))


class GatedDeltaNet(DeltaNet):
    """S_t = g_t (1 - b k k') S_{t-1} + b k v: a decay per token before the correction, and an
    output gate.

    Source: Yang et al. 2024 (arXiv:2412.06464); its keys are narrower and its values wider than
    width, here both are as wide.
    """

    def __init__(
        self, width: int, heads: int, *, conv_kernel: int = 4, allow_neg_eigval: bool = False
    ):
        super().__init__(width, heads, conv_kernel=conv_kernel, allow_neg_eigval=allow_neg_eigval)
        self.forget = nn.Linear(width, heads, bias=False)
        self.gate = nn.Linear(width, width, bias=False)
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
