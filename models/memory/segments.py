"""Transformer-XL: every layer's queries also see what came before their segment, and nothing is
learned through that.

What is kept of a token is what came into the layer, before the layer's norm. Keys and values are
made of it again with today's weights, so that the norm, W_k, W_v and W_R learn from what is
recalled; only the token itself does not.

Letters: B rows, T tokens of a row, M tokens recalled, S tokens that may be seen.
"""

from typing import Any

from torch import Tensor, nn

from models.attention.base import SplitAttention
from models.carried_state import StatefulModule
from models.layer import hook
from models.masks.segments import STALE, SegmentRecurrence
from models.memory.base import Memory
from models.primitives.softmax import Softmax
from models.ranges import Piece
from models.span import READ, Span


class SegmentMemory(Memory):
    """Attention sees the last M tokens before its segment, in this row and in those before;
    recurrent layers go on.

    Args:
        length: M. 0 where no layer is attention: a recurrent layer carries its state whatever M is.
        segment: tokens of a document in a segment, counted from the document's start; null: the row
            is one segment. With it, outputs do not depend on where rows are cut, only gradients do.

    A layer's own mask holds over what is recalled as well: a window sees no further than its reach,
    and what a mask shows beyond M (the first tokens of a document, a chunk's start) is not there.
    Roles are not kept: recalled tokens are text.

    Source: Dai et al. 2019 (arXiv:1901.02860); with position=relative their scores, with any other
    those of the position. Ours has a norm before each layer, as their pre_lnorm; knows documents,
    which nothing is seen across; and unless `segment` is null counts segments by document. Theirs
    keeps M tokens counted back from the end of the batch as well.
    """

    def __init__(self, length: int, segment: Piece | None = None):
        if length < 0:
            raise ValueError(
                f"memory.length={length} is a number of tokens; use 1 or more, or memory=none"
            )
        if segment is not None and segment < 1:
            raise ValueError(
                f"memory.segment={segment} is a number of tokens; use 1 or more, or null: the"
                " whole row"
            )
        self.length = length
        self.segment = segment
        self.taken = False

    def around(self, mixer: nn.Module, **sizes: Any) -> nn.Module:
        """The mixer, which from now on recalls; its parameters and their names stay as they are.

        Raises:
            ValueError: the mixer or its position has no exact form with rows that go on.
        """
        reason = hook(mixer, "carries_over")()
        if reason is not None:
            raise ValueError(f"memory=segments: {reason}; use another mixer, or memory=none")
        limit = hook(mixer, "max_length")
        if isinstance(mixer, SplitAttention):
            self._attach(mixer, sizes.get("position", getattr(mixer, "position", None)))
        elif any(isinstance(leaf, Softmax) for leaf in mixer.modules()):
            kind = type(mixer).__name__
            raise ValueError(
                f"memory=segments does not know how to let {kind} recall; use a mixer made of"
                " attention, or none"
            )
        elif limit is not None and limit <= sizes.get("context_length", limit):
            raise ValueError(
                f"memory=segments: {type(mixer).__name__} takes documents of {limit} tokens, no"
                " more than a row has, and a document that goes on is longer; use"
                " mixer.context_length=N, the tokens of the longest document, or another mixer"
            )
        return mixer

    def _attach(self, mixer: SplitAttention, position: Any) -> None:
        most = hook(position, "max_length")
        if most is not None:
            raise ValueError(
                f"memory=segments: positions go on from row to row, this position has {most} of"
                " them; use position=relative"
            )
        if not self.length:
            raise ValueError(
                "memory.length=0 leaves attention nothing to recall; use 1 or more, or memory=none"
            )
        self.taken = True
        mixer.recall = SegmentReader(self.length, self.segment)
        for leaf in mixer.modules():
            if self.segment is not None and isinstance(leaf, Softmax):
                leaf.mask = leaf.mask & SegmentRecurrence(self.segment, self.length)

    def stack(self, width: int) -> nn.Module | None:
        """Nothing stands around the layers.

        Raises:
            ValueError: no layer took what is set.
        """
        if not self.taken and (self.length or self.segment is not None):
            raise ValueError(
                f"memory.length={self.length}, memory.segment={self.segment}: no layer is attention"
                " and recurrent layers carry their state without; use memory.length=0"
                " memory.segment=null"
            )
        return None


class SegmentReader(StatefulModule):
    """The keys that the queries of a layer may see: kept tokens, earlier segments, the row.

    Args:
        length, segment: as Segments has them.
    """

    def __init__(self, length: int, segment: int | None):
        super().__init__()
        self.kept = (
            length if segment is None else length + segment - 1
        )  # a row may begin anywhere in a segment
        self.segmented = segment is not None

    def forward(self, x: Tensor, span: Span) -> tuple[list[Tensor], Span]:
        """x [B, T, width] -> (pieces of [B, S, width], x the last, and their addresses); keeps of x
        what later rows recall."""
        seen = [x.detach(), x] if self.segmented else [x]
        found = None
        # Where tokens continue their row, attention itself holds what came before.
        before = None if span.past is None else span.past.earlier_rows(self.place, x, self.kept)
        if before is not None:
            tokens, found = before
            seen = [tokens.to(x.dtype), *seen]
        if len(seen) == 1:
            return seen, span
        # Layers share the object, by which they find what others derived from it.
        key = "recalled", self.segmented
        return seen, span.cache.get(key, lambda: self._join(span, found), found)

    def _join(self, span: Span, found: Span | None) -> Span:
        row = span.cast(STALE).join(span) if self.segmented else span
        return row if found is None else found.cast(READ).join(row)
