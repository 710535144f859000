"""Small recurrent layers around a Relay: a cell with gates, read token by token, and one that sees
a whole piece."""

import torch
from torch import nn

from models.primitives.sequential import SequentialScan, segments_by_document


class Gates(nn.Module):
    """An LSTM, its sums written out: a state (h, c), nothing at the start of a document, kept at
    padding."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gates, self.hidden = nn.Linear(width + hidden, 4 * hidden), hidden

    def step(self, xs, span, state):
        (x,), (h, c) = xs, state
        found = []
        for t in range(x.shape[1]):
            opens, valid = span.opens()[:, t, None], span.valid()[:, t, None]
            h, c = (torch.where(opens, 0, s) for s in (h, c))
            i, f, o, new = self.gates(torch.cat([x[:, t], h], -1)).chunk(4, -1)
            then = f.sigmoid() * c + i.sigmoid() * new.tanh()
            h, c = torch.where(valid, o.sigmoid() * then.tanh(), h), torch.where(valid, then, c)
            found.append(h)
        return torch.stack(found, 1), (h, c)


class Lstm(nn.Module):
    """[B, T, width] -> [B, T, hidden], and the last state; `size` and `depth` as Relay takes
    them."""

    def __init__(
        self,
        width: int,
        hidden: int,
        size: int | None = None,
        depth: int | None = None,
        rows: int = 1,
    ):
        super().__init__()
        self.cell, self.relay, self.size, self.depth = (
            Gates(width, hidden),
            SequentialScan(rows=rows),
            size,
            depth,
        )

    def blank(self, x):
        return tuple(x.new_zeros(x.shape[0], self.cell.hidden) for _ in range(2))

    def forward(self, x, span, state=None):
        state = self.blank(x) if state is None else state
        return self.relay(self.cell.step, (x,), state, span=span, size=self.size, depth=self.depth)


class Summing(nn.Module):
    """Adds to each token a map of what the pieces before held: the cut matters, and pieces hold
    tokens of one document."""

    def __init__(self, width: int, size: int | None = None, depth: int | None = None):
        super().__init__()
        self.read, self.write = nn.Linear(width, width), nn.Linear(width, width)
        self.relay, self.size, self.depth = SequentialScan(segments_by_document), size, depth

    def step(self, xs, span, state):
        (x,), (held,) = xs, state
        assert int((span.doc.amax(1)[:, None] != span.doc).logical_and(span.valid()).sum()) == 0, (
            "a piece holds one document"
        )
        held = torch.where(span.opens()[:, :1], 0, held)
        seen = torch.where(span.valid()[..., None], self.write(x), 0)
        return (x * 0.1 + self.read(held)[:, None]).tanh(), ((held + seen.sum(1)).tanh(),)

    def blank(self, x):
        return (torch.zeros_like(x[:, 0]),)

    def forward(self, x, span, state=None):
        state = self.blank(x) if state is None else state
        return self.relay(self.step, (x,), state, span=span, size=self.size, depth=self.depth)
