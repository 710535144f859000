"""ALiBi: no positions but a penalty on distance, so that models read further than they were
trained."""

import torch
from torch import Tensor, nn

from models.positions.base import Position
from models.scores import Score
from models.span import Span


def slopes(heads: int) -> list[float]:
    """Nats per token of distance, one for each head: 2^(-8/n), 2^(-16/n), ... where heads are a
    power of two n.

    Other numbers of heads take those of the next lower power n, then every other one of 2n.
    """
    power = 1 << (heads.bit_length() - 1)
    steep = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return steep + [2.0 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]


class Alibi(Position):
    """Logits lose slope x distance; distance is counted both ways, so that attention without a
    causal mask has it too.

    Source: Press et al. 2021 (arXiv:2108.12409). Bloom's form adds slope x key position, which
    under a causal mask differs by a constant for each query, and so not at all.
    """

    def score(self, heads: int, head_width: int) -> tuple[Score, nn.Module | None]:
        """A score with a bias of its own, no params."""
        return AlibiScore(heads), None


class AlibiScore(Score):
    """Scaled dot product less slope x distance, by global head number; `heads` says how many there
    are in all."""

    biased = True

    def __init__(self, heads: int):
        super().__init__()
        self.slopes = slopes(heads)

    def bias(self, span: Span, kv_span: Span, heads: Tensor, dtype: torch.dtype) -> Tensor | None:
        """[B, H, T, S], at most 0."""
        apart = (span.pos[:, :, None] - kv_span.pos[:, None, :]).abs().to(dtype)
        slope = torch.tensor(self.slopes, dtype=dtype, device=heads.device)[heads]
        return -slope[:, None, None] * apart[:, None]
