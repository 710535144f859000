"""ALiBi: a penalty on distance instead of positions, so that models read beyond their training.

Letters: B rows, T queries, S keys, H heads.
"""

import torch
from torch import Tensor, nn

from models.positions.base import Position
from models.scores import Score
from models.span import Span, to_device


def slopes(heads: int) -> list[float]:
    """Penalty of each head in nats per token of distance.

    2^(-8/n), 2^(-16/n), ... where heads are a power of two n. Other numbers of heads take those of
    the next lower power n, then every other one of 2n.
    """
    power = 1 << (heads.bit_length() - 1)
    of_power = [2.0 ** (-8 * (index + 1) / power) for index in range(power)]
    further = [2.0 ** (-4 * (2 * index + 1) / power) for index in range(heads - power)]
    return of_power + further


class Alibi(Position):
    """Subtracts slope x distance from logits; distance is absolute, so later keys lose too.

    Source: Press et al. 2021 (arXiv:2108.12409). Bloom's form adds slope x key position, which
    under a causal mask differs by a constant per query and therefore gives equal weights.
    """

    def score(self, heads: int, head_width: int) -> tuple[Score, nn.Module | None]:
        """A score with a bias of its own, no params."""
        return AlibiScore(heads), None


class AlibiScore(Score):
    """Scaled dot product minus slope x distance, by global head number.

    Args:
        heads: number of heads over all ranks.
    """

    biased = True

    def __init__(self, heads: int):
        super().__init__()
        self.slopes = slopes(heads)

    def bias(self, span: Span, kv_span: Span, heads: Tensor, dtype: torch.dtype) -> Tensor | None:
        """[B, H, T, S], at most 0."""
        distance = (span.pos[:, :, None] - kv_span.pos[:, None, :]).abs().to(dtype)
        slope = to_device(self.slopes, heads.device, dtype)[heads]
        return -slope[:, None, None] * distance[:, None]
