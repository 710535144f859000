"""Rotary positions stretched by YaRN: fast pairs stay, slow ones are interpolated, and logits grow
a little."""

from math import ceil, floor, log, pi

import torch
from torch import Tensor

from models.positions.interpolated import stretch
from models.positions.rope import Rope
from models.ranges import Shares
from models.span import Span


class Yarn(Rope):
    """Pairs that turn often within the trained length keep their speed, pairs that turn rarely are
    slowed by `factor`.

    Args:
        factor: s, how many times longer documents may be.
        original_length: L0, tokens that the positions were trained for.
        theta: of the rotary positions that were trained.
        beta_fast, slow: turns within L0 above which a pair keeps its speed, and below which it is
            slowed in full.
        attention_factor: m, by which turned queries and keys are multiplied (logits by m^2); null:
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
        self.attention_factor = (
            0.1 * log(factor) + 1 if attention_factor is None else attention_factor
        )

    def ramp(self, width: int) -> tuple[float, float]:
        """The pair up to which speeds are kept, and the one from which they are slowed in full."""
        fast, slow = (
            width * log(self.original_length / (2 * pi * turns)) / (2 * log(self.theta))
            for turns in self.turns
        )
        low = max(floor(fast), 0)
        high = min(ceil(slow), width - 1)
        return low, max(high, low + 1e-3)

    def inv_freq(self, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[width / 2] radians per token, fastest first."""
        speed = super().inv_freq(width, device, dtype)
        low, high = self.ramp(width)
        slowed = (
            (torch.arange(width // 2, device=device, dtype=dtype) - low) / (high - low)
        ).clamp(0, 1)
        return speed * (1 - slowed) + speed / self.factor * slowed

    def rotate(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, H, D] turned and magnified, computed in at least float32."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (super().rotate(wide, span) * self.attention_factor).to(x.dtype)
