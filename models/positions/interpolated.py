"""Rotary positions interpolated, to reach further than they were trained."""

import torch
from torch import Tensor

from models.positions.rope import Rope


class Interpolated(Rope):
    """Rotates every pair `factor` times slower: position p turns as far as p / factor did.

    Args:
        factor: how many times longer documents may be.
        theta: as in the rotary positions that were trained.

    Source: Chen et al. 2023 (arXiv:2306.15595).
    """

    def __init__(self, factor: float, theta: float = 10_000.0):
        super().__init__(theta)
        self.factor = stretch(factor)

    def inv_freq(self, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[width / 2] radians per token, fastest first."""
        return super().inv_freq(width, device, dtype) / self.factor


def stretch(factor: float) -> float:
    """Returns the factor if positions can be stretched by it.

    Raises:
        ValueError: the factor is below 1.
    """
    if factor < 1:
        raise ValueError(
            f"position.factor={factor} would shorten the context; use 1 or more, or position=rope"
        )
    return factor
