"""Rotary positions with a larger base: fast pairs keep their speed, slow ones slow down.

They reach further than they were trained.
"""

import torch
from torch import Tensor

from models.positions.interpolated import stretch
from models.positions.rope import Rope


class Ntk(Rope):
    """Rotary positions of base theta * s^(D / (D - 2)): the slowest pair turns s times slower.

    Args:
        factor: s; or, where original_length is set, the factor f of the "dynamic" form, s = f L /
            L0 - (f - 1).
        theta: as in the rotary positions that were trained.
        original_length: L0, tokens that the positions were trained for; null: s is the factor
            itself.
        context_length: L, tokens of a row of this run; used for every document of the run, so that
            all ranks agree.

    Source: bloc97 2023, "NTK-aware scaled RoPE", described in Peng et al. 2023
    (arXiv:2309.00071, section 3.1). Their dynamic form follows the length decoded so far; ours is
    one base for the whole run.
    """

    def __init__(
        self,
        factor: float,
        theta: float = 10_000.0,
        *,
        original_length: int | None = None,
        context_length: int | None = None,
    ):
        super().__init__(theta)
        self.base_factor = stretch(factor)
        if original_length is not None:
            if original_length < 1:
                raise ValueError(
                    f"position.original_length={original_length} is a number of tokens; use 1 or"
                    " more, or null"
                )
            if context_length is None:
                raise ValueError(
                    f"position.original_length={original_length} needs context_length, which was"
                    " not given; use null"
                )
            length_ratio = max(1.0, context_length / original_length)
            self.base_factor = factor * length_ratio - (factor - 1)

    def inv_freq(self, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[width / 2] radians per token, fastest first."""
        if width < 4:
            raise ValueError(
                f"position=ntk needs heads of at least 4 channels, got {width}; use fewer heads"
            )
        pair = torch.arange(width // 2, device=device, dtype=dtype) / (width // 2)
        # s^(D / (D - 2)) to the power of each pair's exponent; the last pair has 1 - 2 / D
        slowdown = self.base_factor ** -(pair * width / (width - 2))
        return super().inv_freq(width, device, dtype) * slowdown
