"""Transformer-XL's relative positions: scores depend on what keys hold and, apart from it, on how far away they are.

Letters: B rows, T queries, S keys, H heads, D head width, W = H D, N different distances in a block.
"""

import torch
from torch import Tensor, nn

from models.positions.position import Position
from models.positions.sinusoidal import sinusoid
from models.scores import Score, Tensors, dots
from models.span import Span


class Relative(Position):
    """Logit (q + u) k + (q + v) W_R R(distance), over sqrt(D); R holds sines, then cosines, of the distance.

    Args:
        clamp: distances beyond it count as it; null: none do.
        base: wavelengths run from 2 pi to 2 pi base tokens.

    u, v and W_R belong to each layer ("untied"). Source: Dai et al. 2019 (arXiv:1901.02860). Theirs shifts a matrix of all
    distances by one a row; ours looks each pair's distance up by address, so any cut and any packing of documents will do.
    """

    def __init__(self, clamp: int | None = None, base: float = 10_000.0):
        if clamp is not None and clamp < 1:
            raise ValueError(f"position.clamp={clamp} is a distance in tokens; use 1 or more, or null")
        if base <= 1:
            raise ValueError(f"position.base is a wavelength in tokens and must be above 1; got {base}")
        self.clamp, self.base = clamp, base

    def score(self, heads: int, head_width: int) -> tuple[Score, nn.Module | None]:
        """The score, and a module that gives its params (u, v, W_R)."""
        return RelativeScore(self.clamp, self.base), RelativeTables(heads, head_width)


class RelativeTables(nn.Module):
    """Owns u and v [H, D] and W_R [H, D, W]."""

    def __init__(self, heads: int, head_width: int):
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.zeros(heads, head_width)) for _ in range(2))
        self.distance = nn.Parameter(torch.zeros(heads, head_width, heads * head_width))

    def forward(self) -> tuple[Tensor, ...]:
        return self.u, self.v, self.distance


class RelativeScore(Score):
    """Params: u [H, D], v [H, D], W_R [H, D, W]."""

    param_heads = (0, 0, 0)
    plain = False

    def __init__(self, clamp: int | None, base: float):
        super().__init__()
        self.clamp, self.base = clamp, base

    def logits(self, query: Tensors, payload: Tensors, params: Tensors, at: Span, of: Span, heads: Tensor) -> Tensor:
        """[B, H, T, S]."""
        (q, k, _), (u, v, table) = self.operands(query, payload, params), params
        distance, where = distances(at, of)
        if self.clamp is not None:
            distance = distance.clamp(-self.clamp, self.clamp)
        waves = torch.cat(sinusoid(distance.to(q.dtype), table.shape[2], self.base), -1)[:, : table.shape[2]]
        keys = torch.einsum("nw,hdw->hdn", waves, table)  # narrow first: D is a share of W
        by_distance = torch.einsum("bthd,hdn->bhtn", q + v, keys)
        where = where[:, None].expand(-1, q.shape[2], -1, -1)
        return (dots(q + u, k) + by_distance.gather(3, where)) * self.scale(q)


def distances(at: Span, of: Span) -> tuple[Tensor, Tensor]:
    """The different values [N] int64 of pos_q - pos_k, rising, and which of them each pair [B, T, S] has."""
    apart = at.pos[:, :, None] - of.pos[:, None, :]
    low = apart.min()
    found = torch.zeros(int(apart.max() - low) + 1, dtype=torch.bool, device=apart.device)
    found[(apart - low).flatten()] = True
    number = found.cumsum(0) - 1
    return found.nonzero()[:, 0] + low, number[apart - low]
