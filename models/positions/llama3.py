"""Rotary positions stretched as in Llama 3.1: pairs of long waves are slowed, short ones kept.

Between two wavelengths the slowing grows smoothly.
"""

from math import pi

import torch
from torch import Tensor

from models.positions.interpolated import stretch
from models.positions.rope import Rope
from models.ranges import Positive


class Llama3(Rope):
    """Slows pairs whose waves are long against the trained length by `factor`.

    Args:
        factor: how many times slower the slowest pairs turn.
        original_length: tokens that the positions were trained for.
        theta: as in the rotary positions that were trained.
        low_freq_factor: pairs of waves above original_length / low_freq_factor are slowed in full.
        high_freq_factor: pairs of waves below original_length / high_freq_factor keep their speed.

    Source: Grattafiori et al. 2024 (arXiv:2407.21783); the formula is that of the published code
    and of transformers.
    """

    def __init__(
        self,
        factor: float,
        original_length: int,
        theta: float = 10_000.0,
        *,
        low_freq_factor: Positive = 1.0,
        high_freq_factor: Positive = 4.0,
    ):
        super().__init__(theta)
        if not high_freq_factor > low_freq_factor:
            raise ValueError(
                f"position.high_freq_factor={high_freq_factor} must be above"
                f" position.low_freq_factor={low_freq_factor}; 4 and 1 are usual"
            )
        self.factor = stretch(factor)
        self.original_length = original_length
        self.low_freq_factor = low_freq_factor
        self.high_freq_factor = high_freq_factor

    def inv_freq(self, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[width / 2] radians per token, fastest first."""
        inv_freq = super().inv_freq(width, device, dtype)
        # turns in the trained length, in units that put the two borders at low and high
        turns = self.original_length * inv_freq / (2 * pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept_share = ((turns - self.low_freq_factor) / span).clamp(0, 1)
        return inv_freq * kept_share + inv_freq / self.factor * (1 - kept_share)
