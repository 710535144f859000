"""Prefix-LM attention: bidirectional inside a prefix, causal after it."""

from models.attention.full import Attention
from models.masks.basic import Causal, FirstTokens, SameDocument
from models.masks.roles import PrefixTokens
from models.positions.base import Position


class PrefixAttention(Attention):
    """Shows every token of a document the whole prefix; the rest is causal.

    A token belongs to its document's prefix where its role is PREFIX (set by the data: questions,
    instructions), or where it is among the document's first `length` tokens, so that plain text
    trains too.

    Inside the prefix a token sees its own target: the losses of all tokens but the prefix's last
    are meaningless, and loss reports should leave them out. The last token of the prefix predicts
    the first one after it, and counts.

    Args:
        length: tokens at the beginning of every document that form its prefix; 0: only tokens with
            the role PREFIX.

    Source: Liu et al. 2018 (arXiv:1801.10198), Raffel et al. 2019 (arXiv:1910.10683, section 3.2).
    """

    def __init__(self, width: int, heads: int, kv_heads: int, position: Position, *, length: int):
        if length < 0:
            raise ValueError(
                f"length={length}: a number of tokens must be 0 or more; use 0 for roles alone"
            )
        self.length = length
        mask = SameDocument() & (Causal() | PrefixTokens() | FirstTokens(length))
        super().__init__(width, heads, kv_heads, position, mask=mask)

    def runs_by_segment(self) -> str | None:
        """See Layer."""
        return "would take the beginning of each for the prefix of a document"

    def stays_local(self) -> str | None:
        """See Layer."""
        return "prefix attention sees later tokens, which may lie in rows that are not read yet"
