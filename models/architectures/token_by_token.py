"""Models that read a row token by token from a state, and take and give tokens as bits: NTM and
LSTM.

Letters: B rows, T tokens, C bits, V vocabulary.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.carried_state import StatefulModule
from models.layer import Layer
from models.loss import IGNORE
from models.memory.base import Memory
from models.memory.segments import SegmentMemory
from models.micro_batch import MicroBatch
from models.primitives.sequential import SequentialScan
from models.same_graph import tied
from models.span import Span

StateTuple = tuple[Tensor, ...]
# rows that a rank steps through at a time, where ranks take turns: a step is many small operations
ROWS = 4


class TokenByTokenModel(StatefulModule, ABC):
    """A recurrent model over the binary code of token numbers; the state is an explicit tuple of
    tensors [B, ...].

    A token comes in as its C bits, 0 or 1, and what goes out is a logit for each bit of what is to
    be said: a vector of 8 bits is a token from 0 to 255, and marks beyond have a ninth. The
    distribution is the product over bits, so a loss is in nats per token, of the code 0 to 2^C - 1.
    Documents start from a blank state.

    Args:
        vocabulary: token numbers are below it.
        memory: None or no memory: every row starts from a blank state. Segments, with length=0: the
            state goes on from row to row, without a gradient.
    """

    def __init__(self, vocabulary: int, memory: Memory | None = None):
        super().__init__()
        if isinstance(memory, SegmentMemory):
            memory.stack(0)  # refuses settings that only attention takes
        elif memory is not None and type(memory) is not Memory:
            raise ValueError(
                f"{type(self).__name__} carries a state of its own from row to row and takes no"
                " other memory; use memory=segments memory.length=0, or memory=none"
            )
        self.vocabulary = vocabulary
        self.bits = max(1, (vocabulary - 1).bit_length())
        self.relay = SequentialScan(rows=ROWS)

    @abstractmethod
    def blank(self, rows: int, like: Tensor) -> StateTuple:
        """The state before a document, on the device of `like` and in its dtype."""

    @abstractmethod
    def token(self, x: Tensor, state: StateTuple) -> tuple[Tensor, StateTuple]:
        """One token [B, C] from a state: (logits [B, C], the state after it)."""

    def forward(self, batch: MicroBatch | Tensor) -> Tensor:
        """[B, T] int64 -> log-probabilities [B, T, V], or with targets the losses [B, T] in nats (0
        where IGNORE)."""
        tokens, span, targets, _ = MicroBatch.of(batch)
        weight = next(p for p in self.parameters())
        wide = torch.promote_types(weight.dtype, torch.float32)
        blank = self.blank(len(tokens), weight.new_zeros((), dtype=wide))
        state = blank if span.past is None else self._found(span, blank)
        x = code(tokens, self.bits).to(weight.dtype)
        logits, state = self.relay(self._piece, (x,), state, span=span)
        if span.past is not None:
            for number, tensor in enumerate(state):
                span.past.store(f"{self.place}.{number}", tensor)
        logits = tied(logits, *self.parameters())  # what a last token writes is read by nobody
        return self._losses(logits, targets) if targets is not None else self._all(logits)

    def _found(self, span: Span, blank: StateTuple) -> StateTuple:
        """The state that the rows before left."""
        found = (span.past.state(f"{self.place}.{number}") for number in range(len(blank)))
        return tuple(b if f is None else f.to(b.dtype) for f, b in zip(found, blank))

    def _piece(self, xs: StateTuple, span: Span, state: StateTuple) -> tuple[Tensor, StateTuple]:
        """The step of the relay: a stretch of every row, [B, w, C] -> [B, w, C]."""
        (x,) = xs
        blank = self.blank(len(x), state[0])
        out = []
        opens = span.opens()
        held = ~span.valid()
        seen = span if span.pos.is_meta else span.host()
        some_open, some_held = (
            [True] * x.shape[1] if on.is_meta else on.any(0).tolist()
            for on in (seen.opens(), ~seen.valid())
        )
        for t in range(x.shape[1]):
            if some_open[t]:
                state = _where(opens[:, t], blank, state)
            y, after = self.token(x[:, t], state)
            state = _where(held[:, t], state, after) if some_held[t] else after
            out.append(y)
        return torch.stack(out, 1), state

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        wanted = code(targets.clamp_min(0), self.bits).to(logits.dtype)
        nats = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(-1)
        return torch.where(targets != IGNORE, nats, 0)

    def _all(self, logits: Tensor) -> Tensor:
        codes = code(torch.arange(self.vocabulary, device=logits.device), self.bits).to(
            logits.dtype
        )
        return logits @ codes.T - F.softplus(logits).sum(-1, keepdim=True)


class LstmGates(Layer):
    """The four gates of an LSTM cell (Hochreiter & Schmidhuber 1997; forget gate: Gers et al.
    2000), without peepholes."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.width = width
        self.all = nn.Linear(inputs + width, 4 * width)

    def init_rules(self) -> dict:
        """Forget gates start open."""
        ones = torch.arange(4 * self.width) // self.width == 1
        return {"all.weight": scaled, "all.bias": lambda shape, generator: ones.to(torch.float32)}

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """([B, width], [B, width]): what it says, and its cell."""
        wide = cell.dtype
        gates = self.all(torch.cat([x, hidden], -1).to(self.all.weight.dtype)).to(wide)
        enter, keep, say, new = gates.chunk(4, -1)
        cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
        return say.sigmoid() * cell.tanh(), cell


def code(tokens: Tensor, bits: int) -> Tensor:
    """[...] int64 -> [..., bits] int64, 0 or 1: the binary code of token numbers, the lowest bit
    first."""
    return tokens[..., None] >> torch.arange(bits, device=tokens.device) & 1


def scaled(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Normal with a deviation of 1 / sqrt(inputs): recurrences need gains near 1, which 0.02 is
    not."""
    return torch.randn(shape, generator=generator) * shape[-1] ** -0.5


def _where(which: Tensor, a: StateTuple, b: StateTuple) -> StateTuple:
    """Of each row the state a where `which` [B], else b."""
    return tuple(torch.where(which.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(a, b))
