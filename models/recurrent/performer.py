"""Performer: random positive features whose products estimate the softmax's weights without bias
(FAVOR+).

Letters: B rows, T tokens, H heads, D head width, M features.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from models.ranges import Many
from models.recurrent.linear import LinearAttention

# exponent up to which a key's feature may grow: sums over any number of tokens stay finite in
# float32
ROOM = 60.0


@lru_cache(maxsize=256)
def directions(seed: int, layer: int, draw: int, heads: int, features: int, width: int) -> Tensor:
    """[H, M, D] float64: normal vectors, orthogonal in blocks of D; a pure function of its
    arguments, always on the CPU."""
    digest = hashlib.blake2b(
        f"{seed}/random features/{layer}/{draw}".encode(), digest_size=8
    ).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    with torch.device("cpu"):
        blocks = -(-features // width)
        square = torch.randn(heads, blocks, width, width, generator=generator, dtype=torch.float64)
        turned = torch.linalg.qr(square)[0].transpose(-1, -2).flatten(1, 2)[:, :features]
        lengths = torch.randn(
            heads, features, width, generator=generator, dtype=torch.float64
        ).norm(dim=-1)
        return turned * lengths[..., None]


class Performer(LinearAttention):
    """Softmax attention estimated with `features` orthogonal random features.

    Args:
        width, heads: as for any attention.
        seed, layer: what the features are drawn from, with the number of the draw.
        features: M; the error falls as 1 / sqrt(M), the cost rises as M.
        redraw: steps after which fresh features are drawn; 0: never. `on_step_begin` says where training
            stands.

    Source: Choromanski et al. 2020 (arXiv:2009.14794). The usual stabiliser of the keys is their
    maximum over time, which sees the future and differs between shards; ours is the largest that a
    feature can be at all, a number known from the draw, and only as much of it as float32 needs.
    The queries' maximum is each token's own and cancels.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        seed: int,
        layer: int,
        *,
        features: Many = 128,
        redraw: int = 1000,
    ):
        super().__init__(width, heads)
        if features < 1 or redraw < 0:
            raise ValueError(
                f"features={features} must be 1 or more and redraw={redraw} a number of steps, 0"
                " for never"
            )
        self.heads = heads
        self.seed = seed
        self.layer = layer
        self.features_count = features
        self.redraw = redraw
        self.draw = 0

    def on_step_begin(self, step: int) -> None:
        """Say which step comes next (the first is 1): features are a function of it, so a resume
        needs nothing saved."""
        self.draw = (step - 1) // self.redraw if self.redraw else 0

    def features(self, x: Tensor, queries: bool) -> Tensor:
        """[B, T, H, D] -> [B, T, H, M], positive: exp(w x - |x|^2 / 2) of x D^(-1/4), up to a
        factor for all keys."""
        wide = torch.promote_types(x.dtype, torch.float32)
        drawn = directions(
            self.seed, self.layer, self.draw, self.heads, self.features_count, self.head_width
        )
        stabiliser = max(0.0, drawn.square().sum(-1).max().item() / 2 - ROOM)
        x = x.to(wide) * self.head_width**-0.25
        w = drawn.to(x.device, wide)
        exponent = torch.einsum("bthd,hmd->bthm", x, w) - x.square().sum(-1, keepdim=True) / 2
        if queries:
            return (exponent - exponent.detach().amax(-1, keepdim=True)).exp()
        return (exponent - stabiliser).exp()
