"""Recency: the newest tokens of each row, whatever the mask would still show."""

from models.cache.eviction.base import EvictingCache, Eviction
from models.cache.slots import SlotTable
from models.masks.algebra import Mask
from models.ranges import Piece
from models.span import Span


class Window(Eviction):
    """`cache=window`: the `budget` newest tokens.

    Args:
        budget: tokens that a layer holds of each row, those at hand among them. A piece that is
            longer is attended to in full, and cut when the next tokens come.

    The baseline of the other policies. Unlike the mask of mixer=sliding it is a choice of the
    cache: the model was trained to see further.
    """

    def __init__(self, budget: Piece):
        super().__init__(budget)

    def create(self, place: str, mask: Mask, slots: SlotTable) -> "WindowCache":
        """See KVCacheFactory."""
        return WindowCache(self.budget)


class WindowCache(EvictingCache):
    """Drops the oldest tokens before new ones come."""

    def make_room(self, span: Span) -> None:
        """See EvictingCache."""
        if self.addresses is None:
            return
        coming = span.valid().sum(1)
        room = (self.budget - coming).clamp_min(0)
        current = self.current()
        from_the_end = current.flip(1).long().cumsum(1).flip(1)
        full = from_the_end.amax(1) + coming > self.budget
        wanted = current & (from_the_end <= room[:, None])
        # rows with room drop nothing, and rows without new tokens stay as they are
        drops = full & (coming > 0)
        self.keep(wanted | ~drops[:, None])
