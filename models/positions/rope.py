"""Rotary positions: queries and keys are turned by their own position, scores then depend on the
distance alone."""

import torch
from torch import Tensor, nn

from models.positions.base import Position
from models.scores import Score
from models.span import Span


class Rope(Position):
    """Source: Su et al. 2021 (arXiv:2104.09864). Pairs are (i, i + D/2), as in NeoX and Llama, not
    (2i, 2i + 1).

    Args:
        theta: the slowest pair takes about 2 pi base tokens to come round.
    """

    def __init__(self, theta: float = 10_000.0):
        if theta <= 1:
            raise ValueError(
                f"position.theta is a wavelength in tokens and must be above 1; got {theta}"
            )
        self.theta = theta

    def inv_freq(self, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[width / 2] radians per token, fastest first."""
        if width % 2:
            raise ValueError(
                f"rotary positions turn pairs of channels: the head width must be even, got {width}"
            )
        return self.theta ** -(torch.arange(width // 2, device=device, dtype=dtype) / (width // 2))

    def score(self, heads: int, head_width: int) -> tuple[Score, nn.Module | None]:
        """See Position.score; raises ValueError for heads that cannot be turned, when the layer is
        built."""
        self.inv_freq(head_width, torch.device("meta"), torch.float32)
        return super().score(heads, head_width)

    def rotate(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, H, D] turned; angles in float32, or float64 where x is, whatever x is computed
        in."""
        wide = torch.promote_types(x.dtype, torch.float32)
        angle = span.pos[..., None, None].to(wide) * self.inv_freq(x.shape[-1], x.device, wide)
        a, b = x.chunk(2, -1)
        cos = angle.cos()
        sin = angle.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
