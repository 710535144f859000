"""Attention in both directions."""

from models.attention.full import Attention
from models.masks.basic import SameDocument
from models.positions.base import Position
from models.ranges import Count

BOTH_SIDES = (
    "bidirectional attention sees later tokens, which may lie in rows that are not read yet"
)


class Bidirectional(Attention):
    """Shows a token its whole document, later tokens too (Devlin et al. 2018, arXiv:1810.04805).

    For encoders. Under a next-token loss every token sees its own target: such a loss falls to zero
    and measures nothing.

    Args:
        width, heads, kv_heads, position, head_width, bias, out_bias: see Attention.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        position: Position,
        *,
        head_width: Count | None = None,
        bias: bool = False,
        out_bias: bool = False,
    ):
        super().__init__(
            width,
            heads,
            kv_heads,
            position,
            mask=SameDocument(),
            head_width=head_width,
            bias=bias,
            out_bias=out_bias,
        )

    def stays_local(self) -> str | None:
        """See Layer."""
        return BOTH_SIDES
