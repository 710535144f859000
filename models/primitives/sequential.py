"""Relay: a state that only the tokens before can give; a row is read piece after piece, and each
hands its state on.

What a piece does is a step, a function that the owning layer passes in:

    step(xs: tensors [B, w, ...], at: Span [B, w], state: tensors [B, ...]) -> (y [B, w, ...], the
    state after them)

A step treats every row by itself, deals with documents that open among its tokens, and leaves the
state alone at padding. A leaf without parameters. Letters: B rows, T tokens, N pieces of a row, S
slots of a piece, w slots in use, L = N S.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.primitive import Primitive
from models.scores import Tensors
from models.span import PADDING, Span

StepFunction = Callable[
    [tuple[Tensor, ...], Span, tuple[Tensor, ...]], tuple[Tensor, tuple[Tensor, ...]]
]
SegmentCutter = Callable[
    [Span, int | None, int], Tensor
]  # (addresses of whole rows, size, parts) -> index [B, N, S]


class Segments(NamedTuple):
    """Rows cut into pieces.

    Attributes: index: [B, N, S] int64 on the CPU, the token of the row in each slot, -1 where there
        is none. span: [B, L] addresses; padding where there is no token. filled: [B, N] on the
        host, slots up to the last that holds a token which is no padding.
    """

    index: Tensor
    span: Span
    filled: np.ndarray


def segments_by_row(span: Span, size: int | None, parts: int) -> Tensor:
    """Pieces of `size` tokens counted from the start of the row; None: as many pieces as there are
    parts."""
    tokens = span.shape[1]
    size = max(1, -(-tokens // parts) if size is None else size)
    line = torch.arange(-(-tokens // size) * size)
    return torch.where(line < tokens, line, -1).view(1, -1, size).expand(span.shape[0], -1, -1)


def segments_by_document(span: Span, size: int | None, parts: int) -> Tensor:
    """A piece begins with the row, with a document, and every `size` tokens from there: it holds
    tokens of one document.

    None: a piece is all of a document that lies in the row. Rows have as many pieces as they need,
    the last ones are empty.
    """
    doc = span.doc.cpu()
    place = torch.arange(span.shape[1]).expand(span.shape)
    begins = span.opens().cpu()
    begins[:, 1:] |= doc[:, 1:] != doc[:, :-1]
    begins[:, :1] = True
    since = place - torch.where(begins, place, 0).cummax(1).values
    slot = since if size is None else since % size
    valid = doc != PADDING
    number = ((slot == 0) & valid).cumsum(1) - 1
    most = int(number.max()) + 1 if valid.any() else 1
    width = int(slot[valid].max()) + 1 if valid.any() else 1
    index = torch.full((span.shape[0], most, width), -1)
    row = torch.arange(span.shape[0])[:, None].expand(span.shape)
    index[row[valid], number[valid], slot[valid]] = place[valid]
    return index


class SequentialScan(Primitive):
    """A strictly sequential state over the tokens at hand.

    Args:
        cut: how rows are cut into pieces.
        rows: how many rows a step should get at a time, where rows are worked on in turn (over
            ranks: see HandOn). One for a step of large matrices; more where a step is many small
            ones.
    """

    def __init__(self, cut: SegmentCutter = segments_by_row, *, rows: int = 1):
        super().__init__()
        if rows < 1:
            raise ValueError(f"rows={rows} is how many rows a step gets at a time; use 1 or more")
        self.sharding = cut
        self.rows = rows

    def forward(
        self,
        step: StepFunction,
        xs: Tensors,
        state: Tensors,
        *,
        span: Span,
        size: int | None = None,
        depth: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(y [B, T, ...], 0 at padding; the state after the last token).

        Args:
            step: see above; gradients flow through what it closes over too.
            xs: tensors [B, T, ...].
            state: tensors [B, ...]; a step gives back the same shapes and dtypes.
            size: tokens of a piece. None promises that pieces may be cut anywhere without making a
                difference.
            depth: the state that comes into every depth-th piece of a row carries no gradient, so
                that none reaches back over more than `depth` pieces; 1: not even into the piece
                before. None: never cut.

        Source of the truncation: Williams & Peng 1990, in its plain form, by disjoint stretches of
            `depth` pieces.
        """
        found = self.pieces(span, size)
        taken = tuple(gather_segments(x, found.index) for x in xs)
        y, last = run_segments(step, taken, tuple(state), found, depth=depth)
        return scatter_segments(y, found.index, span.shape[1]), last

    def pieces(self, span: Span, size: int | None, parts: int = 1) -> Segments:
        """These rows cut into pieces, a multiple of `parts` of them; kept on `at` for the next
        call."""
        if size is not None and size < 1:
            raise ValueError(f"a piece of {size} tokens is none; use 1 or more, or null")
        key = ("relay", self.sharding, size, parts)
        if key not in span.plans:
            span.plans[key] = _pieces(span, self.sharding(span, size, parts), parts)
        return span.plans[key]


def _pieces(span: Span, index: Tensor, parts: int) -> Segments:
    index = F.pad(index, (0, 0, 0, -index.shape[1] % parts), value=-1)
    there = index.flatten(1).to(span.pos.device)
    pos, doc, role = (x.gather(1, there.clamp_min(0)) for x in (span.pos, span.doc, span.role))
    inner_span = Span(pos, doc.masked_fill(there < 0, PADDING), role)
    slots = torch.arange(1, index.shape[2] + 1)
    filled = torch.where(inner_span.valid().cpu().view(index.shape), slots, 0).amax(2)
    return Segments(index, inner_span, filled.numpy())


def gather_segments(x: Tensor, index: Tensor) -> Tensor:
    """[B, T, ...] -> [B, L, ...]: the tokens in their slots, 0 where there is none."""
    there = _wide(index.flatten(1).to(x.device), x)
    return torch.where(there >= 0, x.gather(1, there.clamp_min(0)), 0)


def scatter_segments(y: Tensor, index: Tensor, tokens: int) -> Tensor:
    """[B, L, ...] -> [B, T, ...]: the way back, 0 where a token has no slot."""
    there = _wide(index.flatten(1).to(y.device), y)
    blank = y.new_zeros(
        y.shape[0], tokens + 1, *y.shape[2:]
    )  # the last takes what comes from empty slots
    return blank.scatter(1, torch.where(there >= 0, there, tokens), y)[:, :tokens]


def run_segments(
    step: StepFunction,
    xs: Tensors,
    state: tuple[Tensor, ...],
    pieces: Segments,
    *,
    depth: int | None,
    first: int = 0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(y [B, L, ...], 0 at padding; the state after the last piece).

    Args:
        xs: tensors [B, L, ...]. pieces: of these rows, or some neighbours among them; `first` is
            the number of their first.

    A row whose piece is empty keeps its state. Pieces that are empty in all rows are passed over,
    but for the first: every rank must have built the same graph.
    """
    size = pieces.index.shape[2]
    found = []
    for n, widest in enumerate(pieces.filled.max(0).tolist()):
        if n and not widest:
            found.append(torch.zeros_like(found[0]))
            continue
        here = slice(n * size, n * size + max(1, widest))
        span = pieces.span.map(lambda t, here=here: t[:, here])
        alive = torch.from_numpy(pieces.filled[:, n] > 0).to(xs[0].device)
        if depth is not None and n + first and (n + first) % depth == 0:
            state = _chosen(alive, [s.detach() for s in state], state)
        y, after = step(tuple(x[:, here] for x in xs), span, state)
        assert [(s.shape, s.dtype) for s in after] == [(s.shape, s.dtype) for s in state], (
            "a step keeps its state's shapes"
        )
        state = _chosen(alive, after, state)
        y = torch.where(span.valid().view(*span.shape, *[1] * (y.dim() - 2)), y, 0)
        found.append(F.pad(y, (*[0, 0] * (y.dim() - 2), 0, size - y.shape[1])))
    return torch.cat(found, 1), state


def _chosen(alive: Tensor, a: Tensors, b: Tensors) -> tuple[Tensor, ...]:
    """Of a where the row's piece holds something, else of b; tensors [B, ...]."""
    return tuple(
        torch.where(alive.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(a, b, strict=True)
    )


def sequential_modules(model: nn.Module) -> set[nn.Module]:
    """All modules that run inside a Relay's steps: between its tokens no collective may stand, so
    they are never spread.

    The owner of a Relay names them by a method `stepped(parent)` -> modules, `parent` being the
    module that it stands in (itself, for the outermost).
    """
    found: set[nn.Module] = set()
    for path, module in model.named_modules():
        named = getattr(module, "stepped", None)
        if callable(named):
            parent = model.get_submodule(path.rpartition(".")[0])
            found.update(
                inner
                for part in cast(Iterable[nn.Module], named(parent))
                for inner in part.modules()
            )
    return found


def misfits(model: nn.Module) -> list[str]:
    """Why layers cannot run inside a Relay's steps: one sentence for each that leaves a loss at
    every pass."""
    inside = sequential_modules(model)
    return [
        f"{name} ({type(module).__name__}) leaves a loss of its own at each pass, and here is"
        " passed through piece by piece: all losses but the last would be lost; choose another"
        " layer, or another memory"
        for name, module in model.named_modules()
        if module in inside and hasattr(module, "auxiliary")
    ]


def _wide(index: Tensor, x: Tensor) -> Tensor:
    """[B, L] -> [B, L, ...], as wide as x."""
    return index.view(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
