"""USP: heads are traded among neighbouring ranks, and the ring goes across them.

Source: Fang & Zhao 2024 (arXiv:2405.07719); Gu et al. 2024, LoongTrain (arXiv:2406.18485). Ours is
the Heads driver with a Ring for a core, so that every mask, score and layout that both of them take
is taken by their product.
"""

from models.primitives.softmax import Softmax
from models.span import Span
from parallel.collectives import Grid
from parallel.drivers.softmax_ring import Ring
from parallel.drivers.softmax_ulysses import Ulysses
from parallel.sharding import RankGroup


class Usp(Ulysses):
    """Stands in for a Softmax whose tokens lie over the ranks of a grid, heads innermost."""

    def __init__(self, core: Softmax, grid: Grid):
        heads, ring = grid
        super().__init__(Ring(core, ring), heads)

    def row(self, span: Span) -> RankGroup:
        """What the ranks that trade heads hold together: one part of the ring."""
        return span.sharding.grouped(self.communicator.size)
