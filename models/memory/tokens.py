"""Recurrent memory: a few vectors go through all layers with each segment, and what they have
become goes to the next.

    [read; segment; write]    read: written by the segment before; write: the same vectors

Letters: B rows, T tokens, N pieces of a row, S tokens of a piece, m memory tokens, n of the S slots
that hold a token.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention.longformer import Longformer
from models.carried_state import StatefulModule
from models.init import Rule, ScaledNormal
from models.layer import hook
from models.masks.algebra import And
from models.masks.basic import Causal, SameChunk, SameDocument
from models.masks.roles import RoleKey, RoleQuery
from models.memory.base import LayerStack, Memory
from models.norms import RMSNorm
from models.primitives.sequential import SequentialScan, segments_by_document
from models.primitives.softmax import Softmax
from models.ranges import Few, Piece
from models.same_graph import tied
from models.span import PADDING, READ, WRITE, Span

CAUSAL = Causal() & SameDocument()
MEMORY = SameDocument() & (
    RoleKey(READ) | RoleQuery(WRITE)
)  # all see what is read; what is written sees all


class MemoryTokens(Memory):
    """memory=tokens: segments are read one after the other, and memory tokens are all that goes
    from one to the next.

    Args:
        length: m, memory tokens.
        segment: S, tokens of a segment; null: what lies in the row of a document. Segments begin
            with a row, with a document, and every S tokens from there.
        depth: segments over which the gradient goes back, at most: those of a row fall into
            stretches of so many, and none reaches from one stretch into another. 1: into no segment
            before. null: to the beginning of the row.
        curriculum: steps, rising, at each of which this depth grows by one segment, from 1 to
            `depth`; empty: no curriculum.
        recompute: keep only what goes into a segment, and compute the segment again in backward.

    A segment takes part in attention with positions of its own, 0 to 2 m + S - 1. Of mixers,
    softmax attention sees all that is read and writes from all there is; recurrent mixers and
    convolutions read the same tokens in their order.

    Source: Bulatov et al. 2022 (arXiv:2207.06881). Theirs lengthens the training text by a segment
    at each step of the curriculum; ours always reads whole rows, and lengthens what the gradient
    spans.
    """

    def __init__(
        self,
        length: Few,
        segment: Piece | None = None,
        depth: int | None = None,
        curriculum: Sequence[int] = (),
        recompute: bool = False,
    ):
        for name, value in (("length", length), ("segment", segment), ("depth", depth)):
            if value is not None and value < 1:
                raise ValueError(
                    f"memory.{name}={value}: memory=tokens needs 1 or more; or use memory=none"
                )
        steps = list(curriculum)
        if steps and (
            depth is None or len(steps) != depth - 1 or sorted({*steps}) != steps or steps[0] < 2
        ):
            raise ValueError(
                f"memory.curriculum={steps} with memory.depth={depth}: it says at which steps the"
                " depth becomes 2, 3, ... up to memory.depth; give depth - 1 steps, rising, from 2"
                " on, or []"
            )
        self.length = length
        self.segment = segment
        self.depth = depth
        self.curriculum = steps
        self.recompute = recompute

    def around(self, mixer: nn.Module, **sizes: Any) -> nn.Module:
        """The mixer as it is, its attention seeing memory tokens too."""
        _judge(self, mixer, sizes.get("context_length"))
        if isinstance(
            mixer, Longformer
        ):  # two softmaxes that share the keys out between them by query
            assert isinstance(mixer.global_mix.mask, And)
            to_all = mixer.global_mix.mask.b
            mixer.mix.mask = (mixer.mix.mask | MEMORY) & ~to_all
            mixer.global_mix.mask = (mixer.global_mix.mask | MEMORY) & to_all
            return mixer
        for leaf in mixer.modules():
            if isinstance(leaf, Softmax):
                leaf.mask = leaf.mask | MEMORY
        return mixer

    def stack(self, width: int) -> nn.Module:
        """Around all layers."""
        return RecurrentMemory(self, width)


def _judge(memory: MemoryTokens, mixer: nn.Module, context_length: int | None) -> None:
    """Refuse what has no such form around it.

    Raises:
        ValueError: says what to use.
    """
    segments = f"memory=tokens reads segment by segment, and {type(mixer).__name__}"
    reason = hook(mixer, "runs_by_segment")()
    if reason is not None:
        raise ValueError(f"{segments} {reason}; use another mixer, or memory=none")
    needed = None if memory.segment is None else memory.segment + 2 * memory.length
    if (
        hook(mixer, "max_length") is not None
        and context_length is not None
        and (needed is None or needed > context_length)
    ):
        raise ValueError(
            f"{segments} has filters of context_length={context_length} tokens, fewer than a"
            " segment with its memory tokens may have; use"
            f" memory.segment={max(1, context_length - 2 * memory.length)} or less"
        )


class RecurrentMemory(StatefulModule):
    """Goes through all layers once for each segment. Owns the vectors that a document starts from.

    Args:
        settings: see Tokens.
        width: of the residual stream.
    """

    def __init__(self, settings: MemoryTokens, width: int):
        super().__init__()
        self.settings = settings
        self.depth = settings.depth
        self.memory = nn.Parameter(torch.empty(settings.length, width))
        # Of what is written: else it would grow with every segment that adds to it.
        self.norm = RMSNorm(width)
        self.relay = SequentialScan(segments_by_document)

    def init_rules(self) -> dict[str, Rule]:
        """Memory tokens start as other tokens do."""
        return {"memory": ScaledNormal()}

    def on_step_begin(self, step: int) -> None:
        """Step numbers start at 1."""
        if self.settings.curriculum:
            self.depth = 1 + sum(step >= grown for grown in self.settings.curriculum)

    def cut_in_time(self) -> str | None:
        """See Layer."""
        return "reads segments that begin with the row, and a cut would begin another"

    def sequential_parts(self, parent: Any) -> Iterable[nn.Module]:
        """The layers of the decoder that this stands in."""
        return [parent.blocks]

    def forward(self, x: Tensor, span: Span, through: LayerStack) -> Tensor:
        """[B, T, width] -> [B, T, width], 0 at padding."""
        if span.past is not None and span.past.continues_rows:
            return self._continued(x, span, through)
        found = None if span.past is None else span.past.state(self.place)
        state = self._fresh(x) if found is None else found.to(x.dtype)
        step = partial(self._step, through)
        y, (last,) = self.relay(
            step, (x,), (state,), span=span, size=self.settings.segment, depth=self.depth
        )
        if span.past is not None:
            span.past.store(self.place, last)
        return tied(
            y, self.norm.weight
        )  # else a rank with one segment a row would not use what it writes

    def _continued(self, x: Tensor, span: Span, through: LayerStack) -> Tensor:
        """Continues rows: their open segments are read again, with the tokens at hand behind them.

        What is written depends on all of a segment, so a token costs what its segment costs so far.
        """
        size = self.settings.segment
        past = span.past
        segment = CAUSAL if size is None else CAUSAL & SameChunk(size)
        (held,), held_span = past.extend(self.place, (x,), span, segment, shared=True)
        rows, rows_span, skipped = opened_segments(held, held_span, span, size)
        before = past.state(f"{self.place}.before")
        after = past.state(f"{self.place}.after")
        state = self._fresh(x)
        if before is not None:
            state = torch.where(skipped[:, None, None] > 0, before, after).to(x.dtype)
        begins = [state]

        def step(xs: tuple[Tensor, ...], part: Span, memory: tuple[Tensor, ...]) -> Any:
            alive = part.valid().any(1)[:, None, None]
            begins[0] = torch.where(alive, memory[0], begins[0])
            return self._step(through, xs, part, memory)

        y, (last,) = self.relay(step, (rows,), (state,), span=rows_span, size=size)
        some = span.valid().any(1)[:, None, None]
        past.store(f"{self.place}.before", kept_rows(some, begins[0], before))
        past.store(f"{self.place}.after", kept_rows(some, last, after))
        line = torch.arange(span.shape[1], device=x.device)
        index = (skipped[:, None] + line).clamp_max(y.shape[1] - 1)
        return y.gather(1, index[..., None].expand(*index.shape, y.shape[2]))

    def _fresh(self, x: Tensor) -> Tensor:
        """[B, m, width]: what a document starts from."""
        return self.memory.to(x.dtype).expand(x.shape[0], -1, -1)

    def _step(
        self, through: LayerStack, xs: tuple[Tensor, ...], span: Span, state: tuple[Tensor, ...]
    ) -> Any:
        """One segment: ([B, S, width], (memory [B, m, width],))."""
        read = torch.where(span.opens()[:, :1, None], self._fresh(xs[0]), state[0])
        if self.settings.recompute and torch.is_grad_enabled():
            y, written = checkpoint(
                self._segment,
                through,
                xs[0],
                span,
                read,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            y, written = self._segment(through, xs[0], span, read)
        return y, (written,)

    def _segment(
        self, through: LayerStack, x: Tensor, span: Span, read: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(y [B, S, width], memory [B, m, width])."""
        inner, order = enclosed(span, read.shape[1])
        every = torch.cat([read, x, read], 1)
        out = through(every.gather(1, order[..., None].expand_as(every)), inner)
        back = out.gather(1, order.argsort(1)[..., None].expand_as(out))
        _, y, written = back.split([read.shape[1], x.shape[1], read.shape[1]], 1)
        return y, self.norm(written)


def opened_segments(
    held: Tensor, held_span: Span, span: Span, size: int | None
) -> tuple[Tensor, Span, Tensor]:
    """Takes from what is held the tokens at hand and, before them, those of the same segment.

    Args:
        held: [B, S, width] all tokens that may be needed, those at hand the last of each row.
        held_span: their addresses.
        span: addresses [B, T] of the tokens at hand, padded on the right.

    Returns:
        (tokens [B, N, width], their addresses, the number [B] of those before the tokens at hand).
    """
    pos = span.pos[:, :1]
    doc = span.doc[:, :1]
    start = torch.zeros_like(pos) if size is None else pos // size * size
    earlier = (held_span.doc == doc) & (held_span.pos >= start) & (held_span.pos < pos)
    at_hand = (held_span.doc > doc) | ((held_span.doc == doc) & (held_span.pos >= pos))
    wanted = (earlier | at_hand) & held_span.valid() & (doc != PADDING)
    order = (~wanted).to(torch.int8).argsort(dim=1, stable=True)
    order = order[:, : max(1, int(wanted.sum(1).max()))]
    rows_span = held_span.map(lambda addresses: addresses.gather(1, order))
    empty = ~wanted.gather(1, order)
    rows_span = Span(rows_span.pos, rows_span.doc.masked_fill(empty, PADDING), rows_span.role)
    index = order[..., None].expand(*order.shape, held.shape[2])
    return held.gather(1, index), rows_span, (earlier & wanted).sum(1)


def kept_rows(some: Tensor, new: Tensor, old: Tensor | None) -> Tensor:
    """Returns the new state where a row had tokens, the old one elsewhere."""
    return new if old is None else torch.where(some, new, old.to(new.dtype))


def enclosed(span: Span, length: int) -> tuple[Span, Tensor]:
    """Addresses of [read; segment; write; empty slots], and where among [read; the S slots; write]
    each of these stands.

    [B, 2 m + S] both: a segment that is shorter than its slots has what is written right behind it,
    so that whoever reads tokens in order finds no hole.
    """
    rows, slots = span.shape
    some = torch.ones(
        rows, length, dtype=torch.bool, device=span.pos.device
    )  # also without a segment: layers see tokens
    used = torch.cat([some, span.valid(), some], 1)
    order = (~used).to(torch.int8).argsort(dim=1, stable=True)
    role = torch.cat(
        [torch.full_like(span.role[:, :1], kind).expand(-1, length) for kind in (READ, WRITE)], 1
    )
    role = torch.cat([role[:, :length], span.role, role[:, length:]], 1).gather(1, order)
    pos = torch.arange(slots + 2 * length, device=span.pos.device).expand(rows, -1)
    return Span(pos, torch.where(used.gather(1, order), 0, PADDING), role), order
