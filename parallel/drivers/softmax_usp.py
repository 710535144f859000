"""USP driver of Softmax: trades heads among neighbouring ranks and runs the ring across them.

Source: Fang & Zhao 2024 (arXiv:2405.07719); Gu et al. 2024, LoongTrain (arXiv:2406.18485). Ours is
the Ulysses driver with a Ring as its core, so that every mask, score and layout that both accept is
accepted by their product.
"""

from models.primitives.softmax import Softmax
from models.span import Span
from parallel.collectives import Grid
from parallel.drivers.softmax_ring import Ring
from parallel.drivers.softmax_ulysses import Ulysses
from parallel.sharding import RankGroup


class Usp(Ulysses):
    """Replaces a Softmax whose tokens are sharded over the ranks of a grid, ulysses innermost."""

    def __init__(self, core: Softmax, grid: Grid):
        ulysses_communicator, ring_communicator = grid
        super().__init__(Ring(core, ring_communicator), ulysses_communicator)

    def row(self, span: Span) -> RankGroup:
        """Returns what the ranks that trade heads hold together: one part of the ring."""
        return span.sharding.grouped(self.communicator.size)
