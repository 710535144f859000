"""Performer: random positive features whose products are unbiased estimates of softmax weights
(FAVOR+).

Letters: B rows, T tokens, H heads, D head width, M features.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from models.as_written import as_written
from models.ranges import Many
from models.recurrent.linear import LinearAttention
from models.span import to_device

# Exponent up to which a key's feature may grow: sums over any number of tokens stay finite in
# float32.
ROOM = 60.0


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept may serve in training, whoever asks first
def directions(seed: int, layer: int, draw: int, heads: int, features: int, width: int) -> Tensor:
    """Draws normal vectors, orthogonal in blocks of D; [H, M, D] float64 on the CPU.

    A pure function of its arguments, so that all ranks and a resumed run draw the same.
    """
    purpose = f"{seed}/random features/{layer}/{draw}"
    digest = hashlib.blake2b(purpose.encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    with torch.device("cpu"):
        blocks = -(-features // width)
        square = torch.randn(heads, blocks, width, width, generator=generator, dtype=torch.float64)
        rotations = torch.linalg.qr(square)[0].transpose(-1, -2)
        unit_vectors = rotations.flatten(1, 2)[:, :features]
        # Rows of a rotation have length 1; the estimate is unbiased with lengths of normal vectors.
        normal = torch.randn(heads, features, width, generator=generator, dtype=torch.float64)
        return unit_vectors * normal.norm(dim=-1)[..., None]


class Performer(LinearAttention):
    """Softmax attention estimated with `features` orthogonal random features.

    Args:
        width, heads: as in LinearAttention.
        seed, layer: what the features are drawn from, with the number of the draw.
        features: M; the error falls as 1 / sqrt(M), the cost rises as M.
        redraw: steps after which fresh features are drawn; 0: never.

    Source: Choromanski et al. 2020 (arXiv:2009.14794). The usual stabiliser of the keys is their
    maximum over time, which depends on later tokens and differs between shards; ours is the upper
    bound of a feature, which follows from the draw, reduced to the part that float32 needs. The
    queries' maximum is each token's own and cancels.
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
        if features < 1:
            raise ValueError(f"features={features}: must be 1 or more; 128 is usual")
        if redraw < 0:
            raise ValueError(f"redraw={redraw}: must be a number of steps; use 0 for never")
        self.heads = heads
        self.seed = seed
        self.layer = layer
        self.features_count = features
        self.redraw = redraw
        self.draw = 0

    def on_step_begin(self, step: int) -> None:
        """Chooses the draw of this step.

        It is a function of the step's number, so a resumed run needs nothing from the checkpoint.
        """
        self.draw = (step - 1) // self.redraw if self.redraw else 0

    def features(self, x: Tensor, queries: bool) -> Tensor:
        """Maps [B, T, H, D] to exp(w x - |x|^2 / 2) of x D^(-1/4), [B, T, H, M].

        Keys are scaled by a common factor, each query by a factor of its own; both cancel.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        drawn, stabiliser = self._drawn()
        x = x.to(wide) * self.head_width**-0.25
        w = to_device(drawn, x.device, wide)
        exponent = torch.einsum("bthd,hmd->bthm", x, w) - x.square().sum(-1, keepdim=True) / 2
        if queries:
            return (exponent - exponent.detach().amax(-1, keepdim=True)).exp()
        return (exponent - stabiliser).exp()

    @as_written
    def _drawn(self) -> tuple[Tensor, float]:
        """Returns (the vectors [H, M, D] float64, what exponents of keys are lowered by)."""
        drawn = directions(
            self.seed, self.layer, self.draw, self.heads, self.features_count, self.head_width
        )
        return drawn, max(0.0, drawn.square().sum(-1).max().item() / 2 - ROOM)
