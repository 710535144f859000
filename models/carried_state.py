"""State carried from what lies to the left of the tokens at hand: kept tokens and recurrent states.

A CarriedState travels with a Span, as its `past`. A layer asks it for what was left under its name
and leaves what comes next; whether that lies on this device or over ranks is not the layer's
business. The class here carries state from row to row of a lane (memory=); nothing that it keeps
carries a gradient. A subclass whose `continues_rows` is true carries what came before in the
same row: models.cache.decoding_state.DecodingState while a model decodes, and with gradients
models.pieces.piece_state.PieceState. Then everything that a primitive reads of earlier tokens it
finds here:

    # all tokens of the row that a mask may still show, with their addresses
    payload, kv_span = span.past.extend(self.place, payload, span, mask)

    # the last `length` tokens of the lane, with their addresses
    tokens, kv_span = span.past.tokens(self.place, x, length)
    # the state that `store` left after the row before, or None
    state = span.past.state(self.place)
    at.past.store(self.place, state)

Letters: B rows, T tokens of a row, M tokens kept, m of them at hand (all, on one device).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.layer import Layer
from models.masks.algebra import Mask
from models.primitive import Primitive
from models.scores import Tensors
from models.span import PADDING, Span

# states [B, ...] that every rank has alike; states [U, ...] of the rank's own (row, head) pairs
REPLICATED = "whole"
SHARDED = "dealt"


class StatefulModule(Layer):
    """A module that carries something from row to row; `place` is its name in the model, which
    `name_stateful_modules` fills in."""

    place: str = ""


def name_stateful_modules(model: nn.Module) -> None:
    """Tells every primitive and stateful module its name in the model, so that what it leaves is
    found again.

    Called once, when the model is built: drivers that replace primitives keep the names."""
    for path, module in model.named_modules():
        if isinstance(module, StatefulModule | Primitive):
            module.place = path


class CarriedState:
    """State that rows leave for the next rows of their lanes; one for each micro-batch.

    What is found does not change while a step lasts; what is left is put aside until `advance`, so
    that a layer that is computed again in backward finds what it found.

    Attributes: kept: {name: (M, [B, m, ...])} tokens found. addresses: {M: [B, M]} of the kept
        tokens of whole lanes. states: {name: (kind, tensor)} found. rows: B. continues_rows:
        whether the tokens at hand continue their rows; here they begin new ones, which only
        memories and states connect.
    """

    continues_rows: ClassVar[bool] = False
    # Whether what is stored is handed on with its gradient; then it must be computed with one.
    carries_gradient: ClassVar[bool] = False

    @property
    def closes_row(self) -> bool:
        """True if the row ends with the tokens at hand."""
        return not self.continues_rows

    def __init__(self):
        self.kept: dict[str, tuple[int, Tensor]] = {}
        self.addresses: dict[int, Span] = {}
        self.states: dict[str, tuple[str, Tensor]] = {}
        self.rows = 0
        self._row: Span | None = None
        self._spans: dict[int, Span] = {}
        self._tokens: dict[str, tuple[Tensor, int]] = {}
        self._left: dict[str, tuple[str, Tensor]] = {}

    def attach(self, span: Span) -> Span:
        """The span of the next rows of these lanes, with this Past in it: what a model is called
        with."""
        self.rows = span.shape[0]
        self._row = span
        self._spans = {}
        self._tokens = {}
        self._left = {}
        return span.with_past(self)

    def extend(
        self, place: str, payload: Tensors, span: Span, mask: Mask, *, shared: bool = False
    ) -> tuple[Tensors, Span]:
        """Returns the payload of all tokens of the rows so far, those at hand among them.

        Where rows begin with the tokens at hand, that is what came in.

        Args:
            place: name of the primitive that reads.
            payload: tensors [B, T, ...] of the tokens at hand.
            span: their addresses.
            mask: what it shows to no later query of a row need not come again.
            shared: every rank gets all of it. Otherwise a rank gets the tokens that lie with it.

        Returns:
            Tensors [B, S, ...], and the addresses [B, S] of what is in them.
        """
        return payload, span

    def hold(self, softmax: Any, payload: Tensors, kv_span: Span) -> tuple[Tensors, Span]:
        """Extends the rows of an attention, as `extend` does.

        Args:
            softmax: the primitive (models.primitives.softmax.Softmax) that reads.
            payload, kv_span: as in Softmax.forward.
        """
        if not softmax.extends:
            return payload, kv_span
        return self.extend(softmax.place, payload, kv_span, softmax.mask)

    def attend(
        self,
        softmax: Any,
        query: Tensors,
        payload: Tensors,
        params: Tensors,
        *,
        span: Span,
        kv_span: Span,
        heads: Tensor | None,
    ) -> Tensor:
        """Returns the mean over every visible token of the rows so far, [B, T, H, E].

        Args:
            softmax: the primitive (models.primitives.softmax.Softmax) that reads.
            query, payload, params, span, kv_span, heads: as in Softmax.forward.
        """
        payload, kv_span = self.hold(softmax, payload, kv_span)
        mean, _ = softmax.partial(
            query, payload, params, span=span, kv_span=kv_span, heads=heads, lse=False
        )
        return mean

    def summed(self, part: Tensor) -> Tensor:
        """Returns a sum over tokens of which only those that lie here have been added up."""
        return part

    def tokens(self, name: str, x: Tensor, length: int) -> tuple[Tensor, Span]:
        """(kept [B, m, ...], their addresses), and keeps of x [B, T, ...] what the next rows will
        find.

        Kept tokens have the document number that their document has in the rows at hand; what does
        not go on in them is padding, as all is where nothing was kept.

        Args:
            length: M, tokens of a lane to keep, counted back from the end of the row; the same at
                every call.
        """
        assert self._row is not None, "attach() comes before the forward pass"
        self._tokens[name] = x.detach(), length
        if length not in self._spans:
            self._spans[length] = self._dealt(
                renumbered(self._addresses(length), self._whole(self._row))
            )
        return self._kept(name, x, length), self._spans[length]

    def earlier_rows(
        self, name: str, x: Tensor, length: int, *, every_piece: bool = False
    ) -> tuple[Tensor, Span] | None:
        """Returns what `tokens` does of the rows before this one, for a memory of whole rows; None
        where there is nothing to be read.

        Args:
            every_piece: whether every piece of a row asks for them; otherwise the primitive that
                reads them with the first piece holds them for the others.
        """
        return None if self.continues_rows else self.tokens(name, x, length)

    def note_row(self, row: Span, tokens: Mapping[str, Tensor]) -> None:
        """Takes over, of rows that came in pieces, their last tokens: what `tokens` noted of the
        first piece gives way.

        Args:
            row: addresses of the pieces that are long enough together.
            tokens: by name, x of these pieces.
        """
        self._row = row
        for name, x in tokens.items():
            self._tokens[name] = x.detach(), self._tokens[name][1]

    def row_sum(self, place: str, part: Tensor) -> Tensor:
        """Returns the sum [B, 1, ...] over whole rows, given that over the tokens at hand.

        Raises:
            ValueError: later tokens of the rows are not known.
        """
        if self.continues_rows:
            raise ValueError(
                f"{place}: a sum over a whole row needs its later tokens, which decoding does not"
                " know"
            )
        return part

    def row_lengths(self, span: Span, over: str) -> Tensor | None:
        """Returns the number of tokens of whole rows [B, 1], or of the document of each token at
        hand [B, T]; None where the tokens at hand are all there are."""
        return None

    def state(self, name: str) -> Tensor | None:
        """Returns the state that the rows before left, None at the beginning.

        It belongs to the document that goes on in the first token, if any does.

        A layer whose algebra does not reset at `Span.opens` has to drop it by itself where a
        document opens.
        """
        found = self.states.get(name)
        return None if found is None else found[1]

    def store(self, name: str, state: Tensor, kind: str = REPLICATED) -> None:
        """Keep a state [B, ...] (or, DEALT over ranks, [U, ...]) for the next rows."""
        self._left[name] = kind, state.detach()

    @torch.no_grad()
    def advance(self) -> None:
        """Makes the stored state the one that is read, and forgets where nothing was stored.

        Called after the last use of a row, on every rank."""
        assert self._row is not None, "attach() comes before the forward pass"
        whole = self._whole(self._row)
        row = self._row
        kept = {}
        for name, (x, length) in self._tokens.items():
            kept[name] = length, self._shift(self._kept(name, x, length), x, row, length)
        lengths = {length for length, _ in kept.values()}
        self.addresses = {
            length: advanced_addresses(self._addresses(length), whole) for length in lengths
        }
        self.kept = kept
        self.states = self._left
        self._row = None
        self._spans = {}
        self._tokens = {}
        self._left = {}

    def export_state(self) -> dict[str, Tensor]:
        """All that is kept, as it would be on one device, every tensor with the rows first: what a
        checkpoint holds."""
        found = {}
        for length, span in self.addresses.items():
            found |= {f"{length}/pos": span.pos, f"{length}/doc": span.doc}
        for name, (length, x) in self.kept.items():
            found[f"{length}/{name}"] = self._gathered(x, length)
        for name, (kind, state) in self.states.items():
            found[f"{kind}/{name}"] = self._paired(state) if kind == SHARDED else state
        return found

    def import_state(self, found: Mapping[str, Tensor]) -> None:
        """Take over what `gather` gave, or some of its rows, on any number of ranks."""
        self.kept = {}
        self.addresses = {}
        self.states = {}
        self.rows = len(next(iter(found.values()), ()))
        for path, x in found.items():
            kind, name = path.split("/", 1)
            if not kind.isdecimal():
                self.states[name] = (
                    kind,
                    self._dealt_states(x.flatten(0, 1)) if kind == SHARDED else x,
                )
            elif name == "pos":
                self.addresses[int(kind)] = Span.of(x, found[f"{kind}/doc"])
            elif name != "doc":
                self.kept[name] = int(kind), self._dealt_tokens(x)

    def bytes(self) -> int:
        """Returns the bytes held between rows, without addresses."""
        held = [x for _, x in (*self.kept.values(), *self.states.values())]
        return sum(t.numel() * t.element_size() for t in held)

    def _addresses(self, length: int) -> Span:
        """[B, M] as they were left; padding where nothing was."""
        if length not in self.addresses:
            assert self._row is not None
            pos = self._row.pos.new_zeros(self._row.shape[0], length)
            return Span.of(pos, pos + PADDING)
        return self.addresses[length]

    def _kept(self, name: str, x: Tensor, length: int) -> Tensor:
        """[B, m, ...] as they were left; zeros where nothing was."""
        if name not in self.kept:
            return x.new_zeros(x.shape[0], self._share(length), *x.shape[2:])
        return self.kept[name][1]

    def _whole(self, row: Span) -> Span:
        """[B, T] addresses of the whole rows."""
        return row

    def _share(self, length: int) -> int:
        """Returns the number of the `length` kept tokens that are at hand."""
        return length

    def _dealt(self, span: Span) -> Span:
        """Addresses of those kept tokens that are at hand."""
        return span

    def _shift(self, old: Tensor, x: Tensor, row: Span, length: int) -> Tensor:
        """Of what was kept, followed by the row, the last `length` tokens."""
        return torch.cat([old[:, x.shape[1] :], x[:, -length:]], 1)

    def _gathered(self, x: Tensor, length: int) -> Tensor:
        """[B, m, ...] of every rank -> [B, length, ...]."""
        return x

    def _dealt_tokens(self, x: Tensor) -> Tensor:
        """[B, M, ...] -> [B, m, ...]: the tokens at hand."""
        return x

    def _paired(self, state: Tensor) -> Tensor:
        """[U, ...] of every rank -> [B, H, ...]."""
        return state.unflatten(0, (self.rows, -1))

    def _dealt_states(self, state: Tensor) -> Tensor:
        """[B H, ...] -> [U, ...]: the (row, head) pairs at hand."""
        return state


def renumbered(kept: Span, row: Span) -> Span:
    """[B, M] kept addresses in the document numbers of the rows that follow; padding where the
    document does not go on.

    It goes on where the row's first token stands right after the last one kept.
    """
    goes_on = (
        (kept.pos[:, -1:] + 1 == row.pos[:, :1])
        & (kept.doc[:, -1:] != PADDING)
        & (row.doc[:, :1] != PADDING)
    )
    return Span(
        kept.pos, torch.where(goes_on & (kept.doc != PADDING), row.doc[:, :1], PADDING), kept.role
    )


def advanced_addresses(kept: Span, row: Span) -> Span:
    """[B, M] addresses of a lane's last tokens once `row` is read: those of the document that may
    go on, else padding."""
    before = renumbered(kept, row)
    pos = torch.cat([before.pos, row.pos], 1)
    doc = torch.cat([before.doc, row.doc], 1)
    alive = (doc == doc[:, -1:]) & (doc != PADDING)
    doc = torch.where(alive, 0, PADDING)[:, row.shape[1] :]
    return Span.of(pos[:, row.shape[1] :], doc)
