"""Parts of RWKV layers: token shift, low-rank maps, norm per head, channel mix.

Letters: B rows, T tokens, W width.
"""

import torch
from torch import Tensor, nn

from models.init import Rule
from models.layer import Layer
from models.primitives.causal_conv import CausalConv
from models.span import Span, to_device


class TokenShift(Layer):
    """Difference to the token before: x_{t-1} - x_t, with 0 before a document."""

    def __init__(self):
        super().__init__()
        self.mix = CausalConv()

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, W] -> [B, T, W]."""
        taps = to_device([0.0, 1.0], x.device, x.dtype)[:, None].expand(2, x.shape[2])
        return self.mix((x,), (taps,), span=span) - x


class LowRank(Layer):
    """base + up(act(down(x))), for maps that need not be full.

    Args:
        width: in and out.
        rank: between.
        act: none, tanh or sigmoid, by their functions in torch.
    """

    def __init__(self, width: int, rank: int, act: nn.Module | None = None, *, base: bool = True):
        super().__init__()
        if rank < 1:
            raise ValueError(
                f"rank={rank} is the inner width of a low-rank map and must be 1 or more"
            )
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=base)
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.act(self.down(x)))


class HeadNorm(Layer, nn.GroupNorm):
    """Layer norm of every head of [B, T, W], with weights per channel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def ramp(power: float) -> Rule:
    """1 - (i / W)^power over the channels, the same in every row: early channels look back more
    than late ones."""
    return lambda shape, generator: (
        (1 - (torch.arange(shape[-1]) / shape[-1]) ** power).expand(shape).clone()
    )


class ChannelMix(Layer):
    """RWKV-7's feed-forward layer: down(relu(up(x shifted))^2).

    Args:
        width: of input and output.
        ffn: width of what lies between.
        layer, layers: which layer this is, for the initial weights.

    Source: Peng et al. 2025, RWKV-7 (arXiv:2503.14456).
    """

    power = (
        4  # of the ramp that says how much each channel looks back: the higher the layer, the less
    )

    def __init__(self, width: int, ffn: int, layer: int, layers: int):
        super().__init__()
        self.depth = 1 - layer / layers
        self.shift = TokenShift()
        self.look = nn.Parameter(torch.empty(width))
        self.up = nn.Linear(width, ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def init_rules(self) -> dict[str, Rule]:
        return {"look": ramp(self.depth**self.power)}

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        return self.visit(x, self.shift(x, span))

    def visit(self, x: Tensor, away: Tensor) -> Tensor:
        """[B, T, width], given how far the token before lies from each token."""
        return self.down(self.up(x + away * self.look).relu().square())


class GatedChannelMix(ChannelMix):
    """RWKV-6's feed-forward layer: RWKV-7's, times sigmoid(gate(x shifted)).

    Source: Peng et al. 2024, RWKV-6 (arXiv:2404.05892).
    """

    power = 1

    def __init__(self, width: int, ffn: int, layer: int, layers: int):
        super().__init__(width, ffn, layer, layers)
        self.gate = nn.Linear(width, width, bias=False)
        self.gate_look = nn.Parameter(torch.empty(width))

    def init_rules(self) -> dict[str, Rule]:
        return {**super().init_rules(), "gate_look": ramp(self.depth)}

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        away = self.shift(x, span)
        return self.gate(x + away * self.gate_look).sigmoid() * self.visit(x, away)
