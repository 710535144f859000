"""What RWKV layers share: the token shift, low-rank maps, the norm per head, and the channel mix.

Letters: B rows, T tokens, W width.
"""

import torch
from torch import Tensor, nn

from models.init import Rule
from models.mixing.window import Window
from models.span import Span


class Shift(nn.Module):
    """How far the token before lies from each token: x_{t-1} - x_t, with 0 before a document."""

    def __init__(self):
        super().__init__()
        self.mix = Window()

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, W] -> [B, T, W]."""
        taps = torch.tensor([0.0, 1.0], device=x.device, dtype=x.dtype)[:, None].expand(2, x.shape[2])
        return self.mix((x,), (taps,), at=span) - x


class LowRank(nn.Module):
    """base + up(act(down(x))), for maps that need not be full.

    Args:
        width: in and out.
        rank: between.
        act: none, tanh or sigmoid, by their functions in torch.
    """

    def __init__(self, width: int, rank: int, act: nn.Module | None = None, *, base: bool = True):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank={rank} is the inner width of a low-rank map and must be 1 or more")
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=base)
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.act(self.down(x)))


class HeadNorm(nn.GroupNorm):
    """Layer norm of every head of [B, T, W], with weights per channel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def ramp(power: float) -> Rule:
    """1 - (i / W)^power over the channels, the same in every row: early channels look back more than late ones."""
    return lambda shape, generator: (1 - (torch.arange(shape[-1]) / shape[-1]) ** power).expand(shape).clone()


class ChannelMix(nn.Module):
    """RWKV's feed-forward layer: down(relu(up(x shifted))^2).

    Args:
        width: of what comes in and goes out.
        hidden: of what lies between.
        depth: share of the layers above this one, 1 at the bottom.

    Source: Peng et al. 2025, RWKV-7 (arXiv:2503.14456).
    """

    def __init__(self, width: int, hidden: int, *, depth: float = 1.0):
        super().__init__()
        self.depth, self.shift, self.look = depth, Shift(), nn.Parameter(torch.empty(width))
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def initial(self) -> dict[str, Rule]:
        return {"look": ramp(self.depth**4)}

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        return self.down(self.up(x + self.shift(x, span) * self.look).relu().square())
