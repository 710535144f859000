"""Short convolutions: a filter of a few taps per channel, alone between two gates, or as a part of
other layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.init import Described, Rule, constant
from models.layer import Layer
from models.primitives.causal_conv import CausalConv
from models.span import Span


def uniform(bound: float) -> Rule:
    """Uniform between -bound and bound."""
    return Described(
        lambda shape, generator: (torch.rand(shape, generator=generator) * 2 - 1) * bound,
        f"uniform({bound:.3g})",
    )


class DepthwiseConv(Layer):
    """A learned causal filter for each channel.

    Args:
        width: channels.
        conv_kernel: tokens that it reads, the newest among them.
        bias: added to each channel; it starts at 0.

    Its weights decay as those of nn.Conv1d do: a convolution is a linear map of activations.
    """

    weight_decay = ("weight",)

    def __init__(self, width: int, conv_kernel: int, *, bias: bool = False):
        super().__init__()
        if conv_kernel < 1:
            raise ValueError(
                f"conv_kernel={conv_kernel} must be 1 or more tokens; the token itself counts"
            )
        self.weight = nn.Parameter(torch.empty(conv_kernel, width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.mix = CausalConv()

    def init_rules(self) -> dict[str, Rule]:
        rules: dict[str, Rule] = {"weight": uniform(len(self.weight) ** -0.5)}
        if self.bias is not None:
            rules["bias"] = constant(0.0)
        return rules

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        filtered = self.mix((x,), (self.weight.to(x.dtype),), span=span)
        return filtered if self.bias is None else filtered + self.bias.to(x.dtype)


class SiluDepthwiseConv(DepthwiseConv):
    """Taps and then silu, as linear-time layers have them on queries, keys and values."""

    def forward(self, x: Tensor, span: Span) -> Tensor:
        return F.silu(super().forward(x, span))


class ShortConv(Layer):
    """out(gate_after * filter(gate_before * x)): mixes a few neighbours, knows nothing further
    away.

    Args:
        width: of input and output.
        conv_kernel: tokens that it reads, oneself among them.

    Source: the gated short block of Liquid AI's LFM2 (2025); the shift of H3 (Fu et al. 2022,
    arXiv:2212.14052).
    """

    def __init__(self, width: int, *, conv_kernel: int = 3):
        super().__init__()
        self.inner = nn.Linear(width, 3 * width, bias=False)
        self.taps = DepthwiseConv(width, conv_kernel)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        before, after, value = self.inner(x).chunk(3, -1)
        return self.out(after * self.taps(before * value, span))
