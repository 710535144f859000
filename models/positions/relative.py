"""Transformer-XL's relative positions: scores depend on what keys hold and, apart from it, on how
far away they are.

Letters: B rows, T queries, S keys, H heads, D head width, W = H D, N different distances in a
block.
"""

import torch
from torch import Tensor, nn

from models.init import Rule, ScaledNormal
from models.positions.base import Position
from models.positions.sinusoidal import sinusoid
from models.scores import Score, Tensors, grouped_dot_products
from models.span import Span

# queries that are scored against their distances at once: T queries and S keys have T + S - 1 of
# them
STRIP = 128


class Relative(Position):
    """Logit (q + u) k + (q + v) W_R R(distance), over sqrt(D); R holds sines, then cosines, of the
    distance.

    Args:
        clamp: distances beyond it count as it; null: none do.
        theta: wavelengths run from 2 pi to 2 pi base tokens.

    u, v and W_R belong to each layer ("untied"). Source: Dai et al. 2019 (arXiv:1901.02860). Theirs
    shifts a matrix of all distances by one a row. Ours does so within blocks of two unbroken runs,
    and looks each pair's distance up by address in all others, so any cut and any packing of
    documents will do.
    """

    def __init__(self, clamp: int | None = None, theta: float = 10_000.0):
        if clamp is not None and clamp < 1:
            raise ValueError(
                f"position.clamp={clamp} is a distance in tokens; use 1 or more, or null"
            )
        if theta <= 1:
            raise ValueError(
                f"position.theta is a wavelength in tokens and must be above 1; got {theta}"
            )
        self.clamp = clamp
        self.theta = theta

    def score(self, heads: int, head_width: int) -> tuple[Score, nn.Module | None]:
        """The score, and a module that gives its params (u, v, W_R)."""
        return RelativeScore(self.clamp, self.theta), RelativeTables(heads, head_width)


class RelativeTables(nn.Module):
    """Owns u and v [H, D] and W_R [H, D, W]."""

    def __init__(self, heads: int, head_width: int):
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.zeros(heads, head_width)) for _ in range(2))
        self.distance = nn.Parameter(torch.zeros(heads, head_width, heads * head_width))

    def initial(self) -> dict[str, Rule]:
        return dict.fromkeys(("u", "v", "distance"), ScaledNormal())

    def forward(self) -> tuple[Tensor, ...]:
        return self.u, self.v, self.distance


class RelativeScore(Score):
    """Params: u [H, D], v [H, D], W_R [H, D, W]."""

    param_heads = (0, 0, 0)
    plain = False

    def __init__(self, clamp: int | None, theta: float):
        super().__init__()
        self.clamp = clamp
        self.theta = theta

    def logits(
        self,
        query: Tensors,
        payload: Tensors,
        params: Tensors,
        span: Span,
        kv_span: Span,
        heads: Tensor,
    ) -> Tensor:
        """[B, H, T, S]."""
        q, k, _ = self.operands(query, payload, params)
        u, v, table = params
        apart = evenly(span, kv_span)
        if apart is None:
            distance, where = distances(span, kv_span)
            told = _meet(q + v, self._keys(distance, table)).gather(
                3, where[:, None].expand(-1, q.shape[2], -1, -1)
            )
        else:
            told = self._in_strips(q + v, table, apart, kv_span.shape[1])
        return (grouped_dot_products(q + u, k) + told) * self.scale(q)

    def _in_strips(self, query: Tensor, table: Tensor, apart: int, count: int) -> Tensor:
        """[B, H, T, S]: how each query [B, T, H, D] scores its distances to S keys, where `evenly`
        gave `apart`."""
        tokens = query.shape[1]
        keys = self._keys(
            apart + tokens - 1 - torch.arange(tokens + count - 1, device=query.device), table
        )
        strips = []
        for start in range(0, tokens, STRIP):
            stop = min(start + STRIP, tokens)
            strips.append(
                skewed(
                    _meet(
                        query[:, start:stop], keys[..., tokens - stop : tokens - start + count - 1]
                    ),
                    count,
                )
            )
        return torch.cat(strips, 2)

    def _keys(self, distance: Tensor, table: Tensor) -> Tensor:
        """[H, D, N]: what a query is multiplied with for each distance [N]."""
        if self.clamp is not None:
            distance = distance.clamp(-self.clamp, self.clamp)
        waves = torch.cat(sinusoid(distance.to(table.dtype), table.shape[2], self.theta), -1)[
            :, : table.shape[2]
        ]
        return torch.einsum("nw,hdw->hdn", waves, table)  # narrow first: D is a share of W


def _meet(query: Tensor, keys: Tensor) -> Tensor:
    """[B, H, T, N]: how each query [B, T, H, D] scores each distance [H, D, N]."""
    return torch.einsum("bthd,hdn->bhtn", query, keys)


def evenly(span: Span, kv_span: Span) -> int | None:
    """pos of the first query less that of the first key, where on both axes positions rise by one;
    None where they do not."""
    rows, tokens = span.shape
    keys = kv_span.shape[1]
    if not rows * tokens * keys:
        return None
    line = torch.arange(max(tokens, keys), device=span.pos.device)
    apart = span.pos - line[:tokens]
    start = kv_span.pos - line[:keys]
    even = (apart == apart[:, :1]).all() & (start == start[:, :1]).all()
    first = apart[:, 0] - start[:, 0]
    return int(first[0]) if even & (first == first[0]).all() else None


def skewed(x: Tensor, keys: int) -> Tensor:
    """[..., T, N = T + S - 1] -> [..., T, S]: row i from its element T - 1 - i on. Views alone, by
    which backward is cheap."""
    tokens, size = x.shape[-2:]
    if tokens == 1:
        return x
    return (
        x.flatten(-2)
        .narrow(-1, tokens - 1, tokens * (size - 1))
        .unflatten(-1, (tokens, size - 1))[..., :keys]
    )


def distances(span: Span, kv_span: Span) -> tuple[Tensor, Tensor]:
    """The different values [N] int64 of pos_q - pos_k, rising, and which of them each pair [B, T,
    S] has."""
    apart = span.pos[:, :, None] - kv_span.pos[:, None, :]
    low = apart.min()
    found = torch.zeros(int(apart.max() - low) + 1, dtype=torch.bool, device=apart.device)
    found[(apart - low).flatten()] = True
    number = found.cumsum(0) - 1
    return found.nonzero()[:, 0] + low, number[apart - low]
