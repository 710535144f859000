"""BigBird: neighbouring blocks, the first blocks of a document, and a few random blocks."""

from models.attention.full import CAUSAL, Attention
from models.masks.algebra import Mask
from models.masks.basic import SameDocument
from models.masks.roles import GlobalKey, GlobalQuery
from models.masks.sparse import NeighborBlocks, RandomBlocks
from models.positions.base import Position
from models.ranges import Some


class BigBird(Attention):
    """Attention over a sparse graph of blocks in which any two tokens are a few steps apart.

    Args:
        width, heads, kv_heads, position: as in Attention.
        layer, seed: determine the random blocks, with the numbers of the block and of the head.
        block: tokens in a block, counted from the start of the document.
        window: blocks to each side of its own that a query sees.
        first: blocks at the start of a document that see and are seen by all tokens; tokens with
            the role GLOBAL are too.
        random: further blocks that each block sees.
        per_head: every head draws random blocks of its own.
        symmetric: look to both sides, for encoders. A decoder trained this way sees its targets.

    Source: Zaheer et al. 2020 (arXiv:2007.14062), the internal form (ITC). Ours differs: the random
    blocks are the same in training and evaluation, never repeat a block that is visible anyway, and
    depend on no later token; a document's last block is global only if its tokens have that role,
    since an address does not say how long its document is; if symmetric, a random link is seen from
    both its ends.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        position: Position,
        layer: int,
        seed: int,
        *,
        block: int,
        window: Some = 1,
        first: Some = 1,
        random: Some = 3,
        per_head: bool = True,
        symmetric: bool = False,
    ):
        if first < 0 or random < 0:
            raise ValueError(f"first={first}, random={random}: numbers of blocks must be 0 or more")
        neighbors = NeighborBlocks(block, window)
        global_tokens = first * block
        sparse: Mask = neighbors | GlobalKey(global_tokens) | GlobalQuery(global_tokens)
        if random:
            patterns = heads if per_head else 1
            sparse = sparse | RandomBlocks(
                block, window, first, random, seed, layer, patterns, symmetric
            )
        whole = SameDocument() if symmetric else CAUSAL
        super().__init__(width, heads, kv_heads, position, mask=whole & sparse)

    def stays_local(self) -> str | None:
        """See Layer."""
        return (
            "bigbird's random blocks lie all over a document, of which local attention"
            " sees a segment"
        )
