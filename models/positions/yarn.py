"""Rotary positions stretched by YaRN: fast pairs keep their speed, slow ones are interpolated.

Logits grow slightly with the factor.
"""

from math import ceil, floor, log, pi

import torch
from torch import Tensor

from models.positions.interpolated import stretch
from models.positions.rope import Rope
from models.ranges import Shares
from models.span import Span


class Yarn(Rope):
    """Slows pairs that turn rarely within the trained length by `factor`, and no other pairs.

    Args:
        factor: s, how many times longer documents may be.
        original_length: L0, tokens that the positions were trained for.
        theta: as in the rotary positions that were trained.
        beta_fast: turns within L0 above which a pair keeps its speed.
        beta_slow: turns within L0 below which a pair is slowed in full.
        truncate: let the ramp begin and end at whole pairs, as in the paper's code.
        attention_factor: m, by which rotated queries and keys are multiplied (logits by m^2); null:
            0.1 ln(s) + 1.

    Source: Peng et al. 2023 (arXiv:2309.00071). The ramp between the two runs over whole channels,
    as in their code and in transformers.
    """

    def __init__(
        self,
        factor: float,
        original_length: int,
        theta: float = 10_000.0,
        *,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: Shares | None = None,
        truncate: bool = True,
    ):
        super().__init__(theta)
        if not beta_fast > beta_slow > 0:
            raise ValueError(
                f"position.beta_fast={beta_fast} and position.beta_slow={beta_slow} are turns; use"
                " fast above slow above 0"
            )
        if original_length < 2 * pi * beta_slow:
            raise ValueError(
                f"position.original_length={original_length} is so short that no pair turns"
                f" {beta_slow} times in it; use {ceil(2 * pi * beta_slow)} or more"
            )
        if attention_factor is not None and attention_factor <= 0:
            raise ValueError(
                f"position.attention_factor={attention_factor} would erase queries and keys; use a"
                " positive number, or null"
            )
        self.factor = stretch(factor)
        self.original_length = original_length
        self.turns = (beta_fast, beta_slow)
        self.truncate = truncate
        if attention_factor is None:
            attention_factor = 0.1 * log(factor) + 1
        self.attention_factor = attention_factor

    def ramp(self, width: int) -> tuple[float, float]:
        """The pair up to which speeds are kept, and the one from which they are slowed in full."""
        beta_fast, beta_slow = self.turns
        low = self._pair_with_turns(beta_fast, width)
        high = self._pair_with_turns(beta_slow, width)
        if self.truncate:
            low = floor(low)
            high = ceil(high)
        low = max(low, 0)
        high = min(high, width - 1)
        # a ramp of no length would divide by zero
        return low, max(high, low + 1e-3)

    def _pair_with_turns(self, turns: float, width: int) -> float:
        """The number of the pair, as a real number, that turns this often in the trained length."""
        return width * log(self.original_length / (2 * pi * turns)) / (2 * log(self.theta))

    def inv_freq(self, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[width / 2] radians per token, fastest first."""
        inv_freq = super().inv_freq(width, device, dtype)
        low, high = self.ramp(width)
        pair = torch.arange(width // 2, device=device, dtype=dtype)
        slowed_share = ((pair - low) / (high - low)).clamp(0, 1)
        return inv_freq * (1 - slowed_share) + inv_freq / self.factor * slowed_share

    def rotate(self, hidden: Tensor, span: Span) -> Tensor:
        """Rotates [B, T, H, D] and multiplies by the attention factor, in at least float32."""
        # widened here, because the result must be rounded once, after the multiplication
        widened = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return (super().rotate(widened, span) * self.attention_factor).to(hidden.dtype)
