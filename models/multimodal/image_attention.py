"""Causal attention in which the patches of an image see one another."""

from models.attention.full import Attention
from models.masks.basic import Causal, SameDocument
from models.masks.roles import RoleKey, RoleQuery
from models.positions.base import Position
from models.span import IMAGE


class ImageAttention(Attention):
    """Shows a patch all patches of its document; everything else is causal.

    A document holds one image: patches are known by their role alone.

    Args:
        width, heads, kv_heads, position: see Attention.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, position: Position):
        within_image = RoleQuery(IMAGE) & RoleKey(IMAGE)
        super().__init__(
            width, heads, kv_heads, position, mask=SameDocument() & (Causal() | within_image)
        )

    def cut_in_time(self) -> str | None:
        """See Layer."""
        return "shows a patch later patches, which may lie in pieces that are not there yet"

    def runs_by_segment(self) -> str | None:
        """See Layer."""
        return "would show a patch only the patches of its own segment"

    def stays_local(self) -> str | None:
        """See Layer."""
        return "a patch sees later patches, which may lie in rows that are not read yet"

    def decodes(self) -> str | None:
        """See Layer."""
        return "shows a patch later patches, which a row read token by token does not have yet"
