"""A mask of one's own, in attention of Longspan's:

python -m trainer mixer=full mixer.mask._target_=examples.own.mask.Strided mixer.mask.stride=32
"""

from dataclasses import dataclass

from torch import Tensor

from models.masks.algebra import PARTIAL, Band, Bounds, Mask, distance
from models.ranges import Count
from models.span import Span


@dataclass(frozen=True)
class Strided(Mask):
    """Shows the last `stride` tokens, and before them every one at a multiple of that distance.

    Source: Child et al. 2019 (arXiv:1904.10509), section 4.2, both of its heads in one.
    """

    stride: Count

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        """[B, 1, T, S] bool: the definition."""
        apart = distance(query, key)
        near = apart < self.stride
        on_the_grid = apart % self.stride == 0
        same_document = (query.doc[:, :, None] == key.doc[:, None, :])[:, None]
        return same_document & (apart >= 0) & (near | on_the_grid)

    def coverage(self, query: Bounds, key: Bounds) -> int:
        """PARTIAL is always right; a kernel could skip blocks where EMPTY is told."""
        return PARTIAL

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        """What is seen is no single range of distances."""
        return None
