"""Prefix-LM attention: both ways inside a prefix, causal after it."""

from models.attention.full import Attention
from models.masks.basic import Causal, FirstTokens, SameDocument
from models.masks.roles import PrefixTokens
from models.positions.base import Position


class PrefixAttention(Attention):
    """Everybody in a document sees its whole prefix; the rest is causal.

    A token belongs to its document's prefix where its role is PREFIX (questions, instructions: the
    data says so), or where it is among the document's first `length` tokens, so that plain text
    trains too.

    Inside the prefix a token sees its own target: the losses of all tokens but the prefix's last
    are meaningless, and loss reports should leave them out. The last token of the prefix predicts
    the first one after it, and counts.

    Args:
        length: tokens at the beginning of every document that form its prefix; 0: the roles alone
            tell.

    Source: Liu et al. 2018 (arXiv:1801.10198), Raffel et al. 2019 (arXiv:1910.10683, section 3.2).
    """

    def __init__(self, width: int, heads: int, kv_heads: int, position: Position, *, length: int):
        if length < 0:
            raise ValueError(
                f"prefix length={length} is a number of tokens; use 0 (roles alone tell) or more"
            )
        self.length = length
        mask = SameDocument() & (Causal() | PrefixTokens() | FirstTokens(length))
        super().__init__(width, heads, kv_heads, position, mask=mask)
