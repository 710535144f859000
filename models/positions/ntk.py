"""Rotary positions with a longer base, to reach further than they were trained: fast pairs stay,
slow ones slow down."""

import torch
from torch import Tensor

from models.positions.interpolated import stretch
from models.positions.rope import Rope


class Ntk(Rope):
    """The base grows to base * s^(D / (D - 2)), so that the slowest pair turns s times slower and
    the fastest as before.

    Args:
        factor: s; or, where original_length is set, the factor f of the "dynamic" form, s = f L /
            L0 - (f - 1).
        theta: of the rotary positions that were trained.
        original_length: L0, tokens that the positions were trained for; null: s is the factor
            itself.
        context_length: L, tokens of a row of this run. It stands for every document of the run, so
            that all ranks agree.

    Source: bloc97 2023, "NTK-aware scaled RoPE", written down in Peng et al. 2023
    (arXiv:2309.00071, section 3.1). Theirs of the dynamic form follows the length decoded so far;
    ours is one base for the whole run.
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
        self.longer = stretch(factor)
        if original_length is not None:
            if original_length < 1:
                raise ValueError(
                    f"position.original_length={original_length} is a number of tokens; use 1 or"
                    " more, or null"
                )
            if context_length is None:
                raise ValueError(
                    "position.original_length stretches to context_length, which is not known here;"
                    " leave it out"
                )
            self.longer = factor * max(1.0, context_length / original_length) - (factor - 1)

    def inv_freq(self, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[width / 2] radians per token, fastest first."""
        if width < 4:
            raise ValueError(
                f"position=ntk needs heads of at least 4 channels, got {width}; use fewer heads"
            )
        pair = torch.arange(width // 2, device=device, dtype=dtype) / (width // 2)
        return super().inv_freq(width, device, dtype) * self.longer ** -(pair * width / (width - 2))
