"""Transformer-XL's relative positions: scores depend on keys and, separately, on distances.

Letters: B rows, T queries, S keys, H heads, D head width, W = H D, N different distances in a
block.
"""

import torch
from torch import Tensor, nn

from models.init import Rule, ScaledNormal
from models.layer import Layer
from models.positions.base import Position
from models.positions.sinusoidal import sinusoid
from models.scores import Score, Tensors, grouped_dot_products
from models.span import Span

# Queries scored against their distances at once. T queries and S keys have T + S - 1 distances, so
# a block of all queries would be about twice as large as its logits.
STRIP = 128


class Relative(Position):
    """Logit (q + u) k + (q + v) W_R R(distance), over sqrt(D); R holds sines, then cosines.

    Args:
        clamp: larger distances count as this one; null: no limit.
        theta: wavelengths run from 2 pi to 2 pi theta tokens.

    u, v and W_R belong to each layer ("untied"). Source: Dai et al. 2019 (arXiv:1901.02860). Theirs
    shifts a matrix of all distances by one per row. Ours does so within blocks of two unbroken
    runs and looks up the distance of each pair by address elsewhere, so any sharding and any
    packing of documents gives the same result.
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


class RelativeTables(Layer):
    """Owns u and v [H, D] and W_R [H, D, W]."""

    def __init__(self, heads: int, head_width: int):
        super().__init__()
        self.u = nn.Parameter(torch.zeros(heads, head_width))
        self.v = nn.Parameter(torch.zeros(heads, head_width))
        self.distance = nn.Parameter(torch.zeros(heads, head_width, heads * head_width))

    def init_rules(self) -> dict[str, Rule]:
        """All three start like projections."""
        return dict.fromkeys(("u", "v", "distance"), ScaledNormal())

    def forward(self) -> tuple[Tensor, ...]:
        """(u, v, W_R)."""
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
        content_bias, distance_bias, projection = params
        distance_query = q + distance_bias
        first_distance = evenly(span, kv_span)
        if first_distance is None:
            distance, index = distances(span, kv_span)
            all_scores = _distance_scores(distance_query, self._keys(distance, projection))
            index = index[:, None].expand(-1, q.shape[2], -1, -1)
            distance_scores = all_scores.gather(3, index)
        else:
            distance_scores = self._in_strips(
                distance_query, projection, first_distance, kv_span.shape[1]
            )
        content_scores = grouped_dot_products(q + content_bias, k)
        return (content_scores + distance_scores) * self.scale(q)

    def _in_strips(
        self, query: Tensor, projection: Tensor, first_distance: int, key_count: int
    ) -> Tensor:
        """Scores the distances of two unbroken runs, [B, H, T, S], without a table of pairs.

        Args:
            query: [B, T, H, D].
            first_distance: as `evenly` gives it.
            key_count: S.
        """
        tokens = query.shape[1]
        index = torch.arange(tokens + key_count - 1, device=query.device)
        # the largest distance, of the last query to the first key, comes first
        keys = self._keys(first_distance + tokens - 1 - index, projection)
        strips = []
        for start in range(0, tokens, STRIP):
            stop = min(start + STRIP, tokens)
            strip_keys = keys[..., tokens - stop : tokens - start + key_count - 1]
            strip_scores = _distance_scores(query[:, start:stop], strip_keys)
            strips.append(skewed(strip_scores, key_count))
        return torch.cat(strips, 2)

    def _keys(self, distance: Tensor, projection: Tensor) -> Tensor:
        """Projects the waves of distances [N] to keys [H, D, N]."""
        if self.clamp is not None:
            distance = distance.clamp(-self.clamp, self.clamp)
        width = projection.shape[2]
        waves = torch.cat(sinusoid(distance.to(projection.dtype), width, self.theta), -1)
        # projected before the product with queries, because D is a small share of W
        return torch.einsum("nw,hdw->hdn", waves[:, :width], projection)


def _distance_scores(query: Tensor, keys: Tensor) -> Tensor:
    """Multiplies each query [B, T, H, D] with each distance [H, D, N], [B, H, T, N]."""
    return torch.einsum("bthd,hdn->bhtn", query, keys)


def evenly(span: Span, kv_span: Span) -> int | None:
    """Distance of the first query to the first key, if positions rise by one on both axes.

    Returns:
        None where positions do not rise by one, or where rows differ in that distance.
    """
    rows, queries = span.shape
    keys = kv_span.shape[1]
    if not rows * queries * keys:
        return None
    index = torch.arange(max(queries, keys), device=span.pos.device)
    query_start = span.pos - index[:queries]
    key_start = kv_span.pos - index[:keys]
    unbroken = (query_start == query_start[:, :1]).all() & (key_start == key_start[:, :1]).all()
    first_distance = query_start[:, 0] - key_start[:, 0]
    # one synchronisation with the device for both conditions
    if unbroken & (first_distance == first_distance[0]).all():
        return int(first_distance[0])
    return None


def skewed(scores: Tensor, keys: int) -> Tensor:
    """Shifts each row by one more, [..., T, N = T + S - 1] -> [..., T, S].

    Row i begins at its element T - 1 - i. Made of views alone, so that backward is cheap.
    """
    tokens, size = scores.shape[-2:]
    if tokens == 1:
        return scores
    # Reading the flattened matrix in rows of N - 1 elements moves each row by one.
    shifted = scores.flatten(-2).narrow(-1, tokens - 1, tokens * (size - 1))
    return shifted.unflatten(-1, (tokens, size - 1))[..., :keys]


def distances(span: Span, kv_span: Span) -> tuple[Tensor, Tensor]:
    """Lists the different values of pos_q - pos_k.

    Returns:
        (values [N] int64, rising; index [B, T, S] of each pair's value).
    """
    pairs = span.pos[:, :, None] - kv_span.pos[:, None, :]
    low = pairs.min()
    # a table over the range instead of `unique`, which would sort all pairs
    occurs = torch.zeros(int(pairs.max() - low) + 1, dtype=torch.bool, device=pairs.device)
    occurs[(pairs - low).flatten()] = True
    number = occurs.cumsum(0) - 1
    return occurs.nonzero()[:, 0] + low, number[pairs - low]
