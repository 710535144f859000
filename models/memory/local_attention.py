"""Local attention beside a memory: a mixer of the attention family that sees no further than its
segment.

Letters: B rows, T tokens of a row, S tokens that may be seen.
"""

from typing import Any

from torch import Tensor, nn

from models.attention.full import Attention
from models.carried_state import StatefulModule
from models.layer import hook
from models.masks.basic import SameChunk
from models.primitives.softmax import Softmax
from models.span import Span

WAY_OUT = (
    "use full, multi_head, multi_query, sliding, sinks, sink_logit, chunked, qk_norm, gated or"
    " softcap, or memory=none"
)


def check_segment(segment: int | None) -> None:
    """ValueError where it is no number of tokens."""
    if segment is not None and segment < 1:
        raise ValueError(
            f"memory.segment={segment} is a number of tokens; use 1 or more, or null: the whole row"
        )


def attention_beside(mixer: nn.Module, name: str, position: Any = None) -> Attention:
    """The mixer, if a memory of that name can stand beside its heads.

    Args:
        position: of the model, if it has one; positions go on from row to row.

    Raises:
        ValueError: it cannot; says why, and what to use.
    """
    reason = hook(mixer, "stays_local")()
    if reason is not None:
        raise ValueError(f"memory={name}: {reason}; {WAY_OUT}")
    if not isinstance(mixer, Attention):
        kind = type(mixer).__name__
        raise ValueError(
            f"memory={name} reads and keeps the queries, keys and values of heads, {kind} has"
            f" others; {WAY_OUT}"
        )
    most = hook(position or mixer.position, "max_length")
    if most is not None:
        raise ValueError(
            f"memory={name}: positions go on from row to row, this position has {most} of them; use"
            " position=rope or alibi"
        )
    return mixer


def within_segment(mixer: Attention, segment: int | None) -> None:
    """Let a mixer see its own segment only, the part of it that lies in the row before among it;
    None: the row, as it is."""
    if segment is None:
        return
    mixer.mix = Softmax(mixer.mix.mask & SameChunk(segment), mixer.mix.score)
    if segment > 1:
        mixer.recall = RecentTokens(segment - 1)


class RecentTokens(StatefulModule):
    """Inputs of a layer at the last tokens of the row before, which the next segment may see.

    It carries no gradient; keys and values are made of it with today's weights.

    Args:
        length: tokens.
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def forward(self, x: Tensor, span: Span) -> tuple[list[Tensor], Span]:
        """x [B, T, width] -> (pieces of [B, S, width], x the last of them, and their addresses)."""
        # Where tokens continue their row, attention itself holds what came before.
        found = None if span.past is None else span.past.earlier_rows(self.place, x, self.length)
        if found is None:
            return [x], span
        kept, kv_span = found
        # Layers share the object, by which they find what others derived from it.
        joined = span.cache.get("tail", lambda: kv_span.join(span), kv_span)
        return [kept.to(x.dtype), x], joined
