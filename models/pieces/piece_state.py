"""The carried state of a row that is computed in pieces, one after another, with exact gradients.

Pieces go forward twice. First all of them, left to right and without a gradient: what each leaves
to the next (keys and values, states, tails) is kept, and nothing else. Then right to left, each
with its gradient. What a piece reads from those before it are leaves there; the gradients that they
get are handed, as gradients of what was left, to the piece that left it.

    state = PieceState(spans)
    for number in range(len(spans)):
        model(tokens[number], state.enter(number))                        # under no_grad
    for number in reversed(range(len(spans))):
        loss = model(tokens[number], state.enter(number, learning=True), targets[number]).sum()
        state.handed(loss).backward()
        state.collect()

Whoever runs that loop is parallel.rows_in_time. Only what a later query may still see is kept: a
window costs its own length at each border, a scan its state.

Source: SeCO (arXiv 2505.16710) for softmax attention; OOMB (arXiv 2602.02108) keeps keys the same
way. Ours holds for every primitive that reads `Span.past`.

Letters: B rows, T tokens of a piece, S tokens held, m of the S slots of one rank.
"""

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from models.carried_state import REPLICATED, CarriedState
from models.masks.algebra import Mask
from models.masks.later import readable
from models.pieces.chunks import (
    Chunk,
    Handed,
    PassRecord,
    ReadRule,
    Selection,
    added,
    bounds_after,
    kept_addresses,
    kept_first,
    leaves_of,
    lengths,
    nothing,
    owned,
    taken,
)
from models.scores import Tensors
from models.span import PADDING, Span


class PieceState(CarriedState):
    """The state that pieces of rows leave to later pieces, and the gradients that come back to it.

    Args:
        pieces: addresses of the pieces, [B, T] each, in order; together they are the rows.
        outer: the state of these lanes from row to row, attached to the first piece; None where
            rows carry nothing. It is read, and left as the whole row would leave it.
    """

    continues_rows = True
    carries_gradient = True

    def __init__(self, pieces: Sequence[Span], outer: CarriedState | None = None):
        super().__init__()
        self.pieces = list(pieces)
        self.outer = outer
        self.rows = pieces[0].shape[0]
        self.number = 0
        self.learning = False
        self._pass = PassRecord(pieces[0])
        self._chunks: dict[str, list[Chunk]] = {}
        self._left_states: dict[tuple[str, int], Tensor] = {}
        self._asked_states: dict[tuple[str, int], Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._from_outer: dict[str, tuple[int, Tensor, Span]] = {}
        self._row_tails: dict[str, dict[int, Tensor]] = {}
        whole = [self._whole(piece) for piece in self.pieces]
        self._tokens_of = [piece.shape[1] for piece in whole]
        self._row_addresses = reduce(Span.join, whole)
        self._later = bounds_after(self._row_addresses, self._tokens_of)

    @property
    def last(self) -> int:
        """Number of the last piece."""
        return len(self.pieces) - 1

    @property
    def closes_row(self) -> bool:
        """See CarriedState."""
        return self.number == self.last

    @property
    def needs_last(self) -> bool:
        """True if the first pass over the last piece is needed."""
        return self.outer is not None or bool(self._sums)

    def enter(self, number: int, *, learning: bool = False) -> Span:
        """Returns the addresses of a piece, with this state in them.

        Args:
            learning: whether this is the second pass, with a gradient.
        """
        self.number = number
        self.learning = learning
        span = self._fresh(self.pieces[number])
        self._pass = PassRecord(span)
        return span.with_past(self)

    def handed(self, loss: Tensor) -> Tensor:
        """Returns the loss [], whose backward pass also begins at what this piece left.

        Call it when forward is over, before the backward pass.
        """
        self._pass.over = True
        # A block that is computed again in backward counts its calls anew.
        self._pass.calls = {}
        left = []
        gradients = []
        for tensor, index, asked in self._pass.given:
            # Taken only here: a layer that is computed again must do nothing more or less than it
            # did.
            tensor = taken(tensor, index)
            left.append(tensor)
            gradients.append(torch.zeros_like(tensor) if asked is None else asked.to(tensor.dtype))
        self._pass.given = []
        return Handed.apply(gradients, loss, *left)

    def collect(self) -> None:
        """Takes the gradients of what this piece read, after its backward pass."""
        for read in self._pass.leaves.values():
            for chunk, leaves in read:
                for index, leaf in enumerate(leaves):
                    chunk.asked[index] = added(chunk.asked[index], leaf.grad)
        for name, leaf in self._pass.states.items():
            if leaf.grad is not None:
                self._asked_states[name, self.number - 1] = leaf.grad
        self._pass = PassRecord(self.pieces[self.number])
        # No earlier piece reads what this one left.
        for chunks in self._chunks.values():
            while chunks and chunks[-1].piece >= self.number:
                chunks.pop()
        for key in [key for key in self._left_states if key[1] >= self.number]:
            del self._left_states[key]

    def end_first_pass(self) -> None:
        """Leaves to `outer` what the whole rows would have left. Call it when the first pass is
        over."""
        if self.outer is None or not self._row_tails:
            return
        numbers = sorted(next(iter(self._row_tails.values())))
        self.outer.note_row(
            reduce(Span.join, [self.pieces[number] for number in numbers]),
            {
                name: torch.cat([tails[number] for number in numbers], 1)
                for name, tails in self._row_tails.items()
            },
        )
        self._row_tails = {}

    def bytes(self) -> int:
        """Returns the bytes that the pieces have left and not been asked for yet."""
        held = list(self._left_states.values())
        for chunks in self._chunks.values():
            for chunk in chunks:
                held += chunk.tensors
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    # What primitives ask for.

    def extend(
        self, place: str, payload: Tensors, span: Span, mask: Mask, *, shared: bool = False
    ) -> tuple[Tensors, Span]:
        """See CarriedState."""
        name, first = self._call(place, payload, mask)
        if first:
            self._leave(name, payload, span, mask)
        chunks = self._readable(name, mask)
        if not chunks:
            return payload, span
        return self._with_chunks(name, chunks, payload), self._join(*_spans(chunks), span)

    def tokens(self, name: str, x: Tensor, length: int) -> tuple[Tensor, Span]:
        """Returns the last `length` tokens before this piece, or fewer, with their addresses."""
        key = f"{name}/tail"
        self._leave(key, [x], self._pass.span, length)
        before = self._kept_by_outer(name, x, length)
        chunks = self._readable(key, length)
        if sum(self._tokens_of[: self.number]) >= length:
            before = None
        if not chunks:
            return before or nothing(x, self._pass.span)
        (tail,) = self._with_chunks(key, chunks, None, [x])
        span = self._join(*_spans(chunks))
        if before is None:
            return tail, span
        return torch.cat([before[0].to(x.dtype), tail], 1), self._join(before[1], span)

    def earlier_rows(
        self, name: str, x: Tensor, length: int, *, every_piece: bool = False
    ) -> tuple[Tensor, Span] | None:
        """See CarriedState."""
        found = self._kept_by_outer(name, x, length)
        return found if every_piece or self.number == 0 else None

    def state(self, name: str) -> Tensor | None:
        """See CarriedState."""
        if self.number == 0:
            return None if self.outer is None else self.outer.state(name)
        if name in self._pass.states:
            return self._pass.states[name]
        found = self._left_states.get((name, self.number - 1))
        if found is None or not self.learning or not found.is_floating_point():
            return found
        self._pass.states[name] = found.detach().requires_grad_()
        return self._pass.states[name]

    def store(self, name: str, state: Tensor, kind: str = REPLICATED) -> None:
        """See CarriedState."""
        if self._pass.over:
            return
        if name in self._pass.stored:
            raise ValueError(
                f"{name} runs twice in a pass and carries one state: its row cannot be cut in time;"
                " use parallel.time=1"
            )
        self._pass.stored.add(name)
        if self.learning:
            asked = self._asked_states.pop((name, self.number), None)
            if self.number < self.last and state.requires_grad:
                self._pass.given.append((state, None, asked))
        elif self.number < self.last:
            self._left_states[name, self.number] = owned(state)
        elif self.outer is not None:
            self.outer.store(name, state, kind)

    def row_sum(self, place: str, part: Tensor) -> Tensor:
        """See CarriedState: in the first pass `part` itself, in the second the whole sum."""
        if part.requires_grad:
            raise ValueError(
                f"{place}: a sum over a whole row is known from the first pass, without a gradient;"
                " use parallel.time=1"
            )
        if self.learning:
            return self._sums[place]
        self._sums[place] = self._sums[place] + part if place in self._sums else part
        return part

    def row_lengths(self, span: Span, over: str) -> Tensor | None:
        """See CarriedState."""
        return lengths(self._row_addresses, span, over)

    # How it is done.

    def _call(self, place: str, payload: Tensors, mask: Mask) -> tuple[str, bool]:
        """Returns the name of this call of a primitive, and whether its payload is new."""
        # A part of a layer may be computed again by itself, so calls are told apart by what they
        # bring before they are counted.
        widths = [tuple(x.shape[2:]) for x in payload]
        place = f"{place} {mask} {widths}"
        calls = self._pass.calls.setdefault(place, [])
        for number, earlier in enumerate(calls):
            # Several reads of one payload in a pass are one set of tokens.
            if len(earlier) == len(payload) and all(a is b for a, b in zip(earlier, payload)):
                return f"{place}#{number}", False
        calls.append(list(payload))
        return f"{place}#{len(calls) - 1}", True

    def _leave(self, name: str, payload: Tensors, span: Span, rule: ReadRule) -> None:
        """Keeps of these tokens, in the first pass, what later pieces read; notes in the second
        what they asked."""
        if self._pass.over or self.number == self.last:
            return
        selection = self._selection(span, rule)
        if selection is None:
            return
        if self.learning:
            (chunk,) = [chunk for chunk in self._chunks[name] if chunk.piece == self.number]
            for x, asked in zip(payload, chunk.asked, strict=True):
                if x.requires_grad:
                    self._pass.given.append((x, selection.index, asked))
            return
        tensors = [owned(taken(x, selection.index)) for x in payload]
        chunk = Chunk(self.number, tensors, selection.span, [None] * len(tensors))
        self._chunks.setdefault(name, []).append(chunk)

    def _readable(self, name: str, rule: ReadRule) -> list[Chunk]:
        """Returns what earlier pieces left under a name and this one may read, in order."""
        found = []
        for chunk in self._chunks.get(name, []):
            if chunk.piece < self.number:
                if self.number not in chunk.read:
                    chunk.read[self.number] = self._is_read(chunk, rule)
                if chunk.read[self.number]:
                    found.append(chunk)
        return found

    def _is_read(self, chunk: Chunk, rule: ReadRule) -> bool:
        if isinstance(rule, int):
            return sum(self._tokens_of[chunk.piece + 1 : self.number]) < rule
        parts = self._parts(chunk.span)
        return any(bool(self._keep(part, rule, self.number - 1).any()) for part in parts)

    def _with_chunks(
        self,
        name: str,
        chunks: list[Chunk],
        payload: Tensors | None,
        likes: Tensors | None = None,
    ) -> list[Tensor]:
        """Puts what earlier pieces left before the payload: [B, S, ...] each."""
        likes = likes or payload or []
        parts: list[Tensors] = [chunk.tensors for chunk in chunks]
        if self.learning:
            if name not in self._pass.leaves:
                self._pass.leaves[name] = [(chunk, leaves_of(chunk, likes)) for chunk in chunks]
            parts = [leaves for _, leaves in self._pass.leaves[name]]
        if payload is not None:
            parts = [*parts, list(payload)]
        return [torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)]

    def _join(self, *spans: Span) -> Span:
        """Joins addresses; the same object for the same ones, so that layers find what others
        derived from it."""
        return self._pass.derived.get("joined", lambda: reduce(Span.join, spans), *spans)

    def _kept_by_outer(self, name: str, x: Tensor, length: int) -> tuple[Tensor, Span] | None:
        """Returns what the rows before left under a name, and notes x for the rows to come."""
        if self.outer is None:
            return None
        if not self.learning:
            if name not in self._from_outer:
                kept, span = self.outer.tokens(name, x, length)
                self._from_outer[name] = length, kept, span
            tails = self._row_tails.setdefault(name, {})
            tails[self.number] = x
            longest = max(length for length, _, _ in self._from_outer.values())
            for number in list(tails):
                if sum(self._tokens_of[number + 1 : self.number + 1]) >= longest:
                    del tails[number]
        _, kept, span = self._from_outer[name]
        return kept, span

    def _selection(self, span: Span, rule: ReadRule) -> Selection | None:
        """Returns those of the tokens that later pieces read; None where there are none."""

        def build() -> Selection | None:
            if isinstance(rule, int):
                keeps = self._last_tokens(span, rule)
            else:
                keeps = [self._keep(part, rule, self.number) for part in self._parts(span)]
            if not any(bool(keep.any()) for keep in keeps):
                return None
            if all(bool(keep.all()) for keep in keeps):
                return Selection(None, self._fresh(span).with_past(None))
            return self._selected(span, keeps)

        return self._pass.derived.get(("selection", rule), build, span)

    def _keep(self, span: Span, mask: Mask, number: int) -> Tensor:
        """[B, S] bool on the CPU: what queries after piece `number` may see of these tokens."""
        fields = [tensor.numpy() for tensor in span.host().addresses()]
        keep = np.zeros(span.shape, dtype=bool)
        for row, queries in enumerate(self._later[number]):
            (valid,) = np.nonzero(fields[1][row] != PADDING)
            pos, doc, role = (values[row, valid] for values in fields)
            keep[row, valid] = readable(mask, queries, (pos, doc, role))
        return torch.from_numpy(keep)

    # What differs where rows are sharded (parallel.row_pieces).

    def _fresh(self, span: Span) -> Span:
        """The same addresses; what the first pass derived from them need not last."""
        return span.fresh()

    def _parts(self, span: Span) -> Sequence[Span]:
        """Returns the addresses on every rank."""
        return [span]

    def _last_tokens(self, span: Span, length: int) -> list[Tensor]:
        """Marks the last `length` tokens of a row on every rank, [B, T] bool on the CPU."""
        index = torch.arange(span.shape[1])
        return [(index >= span.shape[1] - length).expand(span.shape)]

    def _selected(self, span: Span, keeps: list[Tensor]) -> Selection:
        """Takes marked tokens, of every row as many as the fullest has."""
        index, filled = kept_first(keeps[0].to(span.pos.device), int(keeps[0].sum(1).max()))
        return Selection(index, kept_addresses(span, index, filled))


def _spans(chunks: list[Chunk]) -> list[Span]:
    return [chunk.span for chunk in chunks]
