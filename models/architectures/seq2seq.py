"""A recurrent encoder-decoder: GRU or LSTM layers on both sides, with or without attention.

Letters: B rows, T tokens of the row, N tokens of whole rows, S tokens of the source, W width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.architectures.source import SourceMemory, needs_source, refuse_memory
from models.carried_state import StatefulModule
from models.init import Rule
from models.loss import token_losses
from models.memory.base import Memory
from models.micro_batch import MicroBatch
from models.primitives.row_replica import RowReplica
from models.ranges import Count, Positive
from models.seq2seq.attention import AttentionKind, EncodedSource, Query, StepAttention
from models.seq2seq.cells import CELLS, Cell, CellKind, CellState, scaled, where_rows
from models.seq2seq.encoder import RecurrentEncoder
from models.span import Span


class DecoderState(NamedTuple):
    """Attributes: cells: states of all layers, end to end. fed: [B, W] the last output."""

    cells: CellState
    fed: Tensor


class Seq2Seq(StatefulModule):
    """A recurrent decoder that reads a source through its last state, and through attention.

    bahdanau: each step asks with the state before it, its cell reads the context, and the readout
    is a maxout of state, token and context. luong_*, local_*: each step asks with its own state,
    and the output tanh(W [context; state]) is fed to the next step. none: the source is known by
    the first state alone.

    Where rows are shared over ranks, the encoder's recurrence passes from rank to rank, every rank
    takes all steps of the decoder's, and each step reads the source that lies with each rank.

    Args:
        vocabulary: number of different tokens, of the source and the row together.
        width: W, of embeddings, states and the memory; half of it for each direction of the
            encoder.
        layers: of cells, in the encoder and in the decoder.
        attention: see StepAttention; none: there is none.
        cell: gru or lstm.
        bidirectional: the encoder reads from both ends.
        window, sigma: of local attention, see StepAttention.
        memory: none; a row has its source.
        tie_embeddings: use the row's embedding as the output head.

    Source: Sutskever et al. 2014 (arXiv:1409.3215); Bahdanau et al. 2014 (arXiv:1409.0473); Luong
    et al. 2015 (arXiv:1508.04025). Theirs start from other weights; here the decoder starts from
    tanh(W e), e both ends of the encoder, in Bahdanau's the backward one alone.
    """

    reads_source = True

    def __init__(
        self,
        vocabulary: int,
        width: int,
        layers: int,
        *,
        attention: AttentionKind = "luong_general",
        cell: CellKind = "gru",
        bidirectional: bool = True,
        window: Count = 10,
        sigma: Positive | None = None,
        memory: Memory | None = None,
        tie_embeddings: bool = False,
    ):
        super().__init__()
        refuse_memory(self, memory)
        self.width = width
        self.previous = attention == "bahdanau"
        self.embed = nn.Embedding(vocabulary, width)
        self.source_embed = nn.Embedding(vocabulary, width)
        self.encoder = RecurrentEncoder(width, layers, cell, bidirectional=bidirectional)
        self.source = SourceMemory()
        self.replica = RowReplica()
        self.attention = None
        if attention != "none":
            self.attention = StepAttention(width, attention, window=window, sigma=sigma)
        fed = 0 if attention == "none" else width
        self.cells = nn.ModuleList(
            CELLS[cell](width, width, 0 if number else fed) for number in range(layers)
        )
        states = len(self._cell(0).blank(1, torch.zeros(())))
        self.bridge = nn.Linear(width, layers * states * width)
        if self.previous:
            # Maxout takes the larger of each pair of channels.
            self.readout = nn.Linear(3 * width, 2 * width)
        else:
            self.readout = nn.Linear(width + fed, width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tie_embeddings:
            self.head.weight = self.embed.weight

    def init_rules(self) -> dict[str, Rule]:
        """Gains near 1, as of the cells."""
        names = ("embed", "source_embed", "bridge", "readout", "head")
        parameters = {name for name, _ in self.named_parameters()}
        return {f"{name}.weight": scaled for name in names if f"{name}.weight" in parameters}

    def source_parts(self) -> tuple[nn.Module, ...]:
        """See Layer."""
        return (self.encoder,)

    def cut_in_time(self) -> str | None:
        """See Layer."""
        return "the source of a row is read whole before its first token"

    def forward(self, batch: MicroBatch) -> Tensor:
        """Returns logits [B, T, vocabulary], or with targets the losses [B, T] in nats.

        Without a source the row goes on from what earlier tokens left in `Span.past`.
        """
        tokens, span, targets, source = MicroBatch.of(batch)
        if source is None and span.past is None:
            raise needs_source(self)
        states = ends = source_span = None
        if source is not None:
            source_span = source.span
            states, ends = self.encoder(self.source_embed(source.tokens), source_span)
        given = None if states is None or ends is None else (states, ends)
        (states, ends), source_span = self.source(span, given, source_span)
        whole = self.replica.addresses(span)
        embedded = self.replica.gather(self.embed(tokens), span)
        found = self._decode(embedded, whole, span, states, ends, source_span)
        hidden = self.replica.own(found, span).to(self.head.weight.dtype)
        if self.previous:
            hidden = self._maxout(hidden, self.embed(tokens))
        if targets is None:
            return self.head(hidden)
        return token_losses(hidden, self.head.weight, targets)

    def _decode(
        self,
        embedded: Tensor,
        whole: Span,
        span: Span,
        states: Tensor,
        ends: Tensor,
        source_span: Span,
    ) -> Tensor:
        """Returns the outputs [B, N, W] of the decoder's steps over whole rows."""
        first = self._first_states(whole, ends, source_span)
        lengths = self._lengths(whole, source_span)
        memory = None
        if self.attention is not None:
            keys = self.attention.keys(states.to(embedded.dtype)).to(states.dtype)
            memory = EncodedSource(keys, states, source_span.doc, source_span.pos)
        projected = self._cell(0).project(embedded)
        state = self._found(span, states, len(embedded))
        opens = whole.opens()
        valid = whole.valid()
        outputs = []
        for token in range(whole.shape[1]):
            beginning = DecoderState(
                first[:, token].split(self.width, -1), torch.zeros_like(state.fed)
            )
            before = _chosen(opens[:, token], beginning, state)
            address = whole.doc[:, token], whole.pos[:, token], lengths[:, token]
            output, after = self._step(projected[:, token], before, address, memory)
            state = _chosen(valid[:, token], after, state)
            outputs.append(output)
        self._leave(span, state)
        return torch.stack(outputs, 1)

    def _step(
        self,
        projected: Tensor,
        state: DecoderState,
        address: tuple[Tensor, Tensor, Tensor],
        memory: EncodedSource | None,
    ) -> tuple[Tensor, DecoderState]:
        """Returns what a token gives to the outputs, and the state after it."""
        if self.attention is None or memory is None:
            cells, top = self._turn(projected, state.cells, None)
            return self._bent(top), DecoderState(cells, state.fed)
        if self.previous:
            asked = self._tops(state.cells)
            context = self.attention(Query(asked, *address), memory)
            cells, _ = self._turn(projected, state.cells, context)
            return torch.cat([asked, context], -1), DecoderState(cells, state.fed)
        cells, top = self._turn(projected, state.cells, state.fed)
        context = self.attention(Query(top, *address), memory)
        output = self._bent(torch.cat([context, top], -1))
        return output, DecoderState(cells, output)

    def _turn(
        self, projected: Tensor, states: CellState, fed: Tensor | None
    ) -> tuple[CellState, Tensor]:
        """Returns the states of all layers after a token, and the hidden state of the last."""
        each = len(states) // len(self.cells)
        after: list[Tensor] = []
        for number in range(len(self.cells)):
            cell = self._cell(number)
            if number:
                projected = cell.project(after[-each].to(projected.dtype))
            state = states[number * each : (number + 1) * each]
            after += cell.step(projected, state, None if number else fed)
        return tuple(after), after[-each]

    def _tops(self, states: CellState) -> Tensor:
        """The hidden state of the last layer."""
        return states[-(len(states) // len(self.cells))]

    def _bent(self, x: Tensor) -> Tensor:
        """tanh(W x), in the type of the states."""
        return torch.tanh(self.readout(x.to(self.readout.weight.dtype))).to(x.dtype)

    def _maxout(self, found: Tensor, embedded: Tensor) -> Tensor:
        """[B, T, 2 W] of states and contexts -> [B, T, W] (Goodfellow et al. 2013)."""
        return self.readout(torch.cat([found, embedded], -1)).unflatten(-1, (-1, 2)).amax(-1)

    def _first_states(self, whole: Span, ends: Tensor, source_span: Span) -> Tensor:
        """[B, N, layers x states x W]: the state before each token, were it to open a document."""
        same = _same_document(whole, source_span).to(ends.dtype)
        known = torch.einsum("bns,bsw->bnw", same, ends)
        if self.previous and self.encoder.bidirectional:
            backward = torch.arange(self.width, device=known.device) >= self.encoder.width
            known = torch.where(backward, known, 0)
        known = self.replica.total(known)
        return torch.tanh(self.bridge(known.to(self.bridge.weight.dtype))).to(ends.dtype)

    def _lengths(self, whole: Span, source_span: Span) -> Tensor:
        """[B, N]: tokens of the source of each token's document."""
        counts = _same_document(whole, source_span).sum(2)
        return self.replica.total(counts.to(torch.float64)).to(torch.long)

    def _found(self, span: Span, like: Tensor, rows: int) -> DecoderState:
        """Returns the state that earlier tokens of these rows left, or a blank one."""
        blanks: list[Tensor] = []
        for number in range(len(self.cells)):
            blanks += self._cell(number).blank(rows, like)
        blanks.append(like.new_zeros(rows, self.width))
        if span.past is not None:
            for number in range(len(blanks)):
                left = span.past.state(f"{self.place}.state.{number}")
                blanks[number] = blanks[number] if left is None else left
        return DecoderState(tuple(blanks[:-1]), blanks[-1])

    def _leave(self, span: Span, state: DecoderState) -> None:
        """Leaves the state for the tokens that follow."""
        if span.past is not None:
            for number, tensor in enumerate((*state.cells, state.fed)):
                span.past.store(f"{self.place}.state.{number}", tensor)

    def _cell(self, number: int) -> Cell:
        cell = self.cells[number]
        assert isinstance(cell, Cell)
        return cell


def _same_document(span: Span, source_span: Span) -> Tensor:
    """[B, N, S] bool."""
    same = span.doc[:, :, None] == source_span.doc[:, None]
    return same & span.valid()[:, :, None]


def _chosen(rows: Tensor, first: DecoderState, second: DecoderState) -> DecoderState:
    """Takes the rows of `first` where `rows` [B] is true, else those of `second`."""
    cells = where_rows(rows, first.cells, second.cells)
    (fed,) = where_rows(rows, (first.fed,), (second.fed,))
    return DecoderState(cells, fed)
