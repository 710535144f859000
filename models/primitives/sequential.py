"""Sequential scan: a state that only the preceding tokens can give.

A row is read segment by segment, and each segment passes its state on. The owning layer passes in a
step, a function that computes one segment:

    step(xs: tensors [B, w, ...], span: Span [B, w], state: tensors [B, ...])
        -> (y [B, w, ...], the state after them)

A step treats every row by itself, handles documents that open among its tokens, and leaves the
state alone at padding. The primitive has no parameters.

Letters: B rows, T tokens, N segments of a row, S slots of a segment, w slots in use, L = N S.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layer import hook
from models.plans import planned
from models.primitive import Primitive
from models.scores import Tensors
from models.span import PADDING, Span, to_device

StepFunction = Callable[
    [tuple[Tensor, ...], Span, tuple[Tensor, ...]], tuple[Tensor, tuple[Tensor, ...]]
]
# (addresses of whole rows, size, parts) -> index [B, N, S]
SegmentCutter = Callable[[Span, int | None, int], Tensor]


class Segments(NamedTuple):
    """Rows cut into segments.

    Attributes:
        index: [B, N, S] int64 on the CPU, the token of the row in each slot, -1 for an empty slot.
        span: [B, L] addresses; padding for an empty slot.
        filled: [B, N] on the host, slots up to the last that holds a token that is not padding.
    """

    index: Tensor
    span: Span
    filled: np.ndarray


def segments_by_row(span: Span, size: int | None, parts: int) -> Tensor:
    """Cuts rows into segments of `size` tokens, counted from the start of the row.

    None: as many segments as there are parts.
    """
    tokens = span.shape[1]
    if size is None:
        size = -(-tokens // parts)
    size = max(1, size)
    padded_length = -(-tokens // size) * size
    line = torch.arange(padded_length)
    return torch.where(line < tokens, line, -1).view(1, -1, size).expand(span.shape[0], -1, -1)


def segments_by_document(span: Span, size: int | None, parts: int) -> Tensor:
    """Cuts rows into segments that hold tokens of one document each.

    A segment begins with the row, with a document, and every `size` tokens from there. None: a
    segment is all of a document that lies in the row. Rows have different numbers of segments; the
    last ones of a shorter row are empty.
    """
    span = span.host()
    doc = span.doc
    place = torch.arange(span.shape[1]).expand(span.shape)
    begins = span.opens()
    begins[:, 1:] |= doc[:, 1:] != doc[:, :-1]
    begins[:, :1] = True
    since = place - torch.where(begins, place, 0).cummax(1).values
    slot = since if size is None else since % size
    valid = doc != PADDING
    number = ((slot == 0) & valid).cumsum(1) - 1
    count = 1
    width = 1
    if valid.any():
        count = int(number.max()) + 1
        width = int(slot[valid].max()) + 1
    index = torch.full((span.shape[0], count, width), -1)
    row = torch.arange(span.shape[0])[:, None].expand(span.shape)
    index[row[valid], number[valid], slot[valid]] = place[valid]
    return index


class SequentialScan(Primitive):
    """A strictly sequential state over the tokens of one device.

    Args:
        cut: the function that cuts rows into segments.
        rows: rows that a step should get at a time, where a driver works on rows in turn. One for a
            step of large matrices; more where a step is many small ones.
    """

    continues_rows = True  # its owner does: it finds the state, passes it in and stores the next

    def __init__(self, cut: SegmentCutter = segments_by_row, *, rows: int = 1):
        super().__init__()
        if rows < 1:
            raise ValueError(f"rows={rows} is how many rows a step gets at a time; use 1 or more")
        self.cutter = cut
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
        """Returns (y [B, T, ...], 0 at padding; the state after the last token).

        Args:
            step: see the top of this file; gradients flow through its closure too.
            xs: tensors [B, T, ...].
            state: tensors [B, ...]; a step returns the same shapes and dtypes.
            size: tokens of a segment. None promises that rows may be cut anywhere without changing
                the result.
            depth: the state that comes into every depth-th segment of a row carries no gradient, so
                that none reaches back over more than `depth` segments; 1: not even into the segment
                before. None: never cut.

        Source of the truncation: Williams & Peng 1990, in its plain form, by disjoint stretches of
            `depth` segments.
        """
        segments = self.pieces(span, size)
        gathered = tuple(gather_segments(x, segments.index) for x in xs)
        y, last = run_segments(step, gathered, tuple(state), segments, depth=depth)
        return scatter_segments(y, segments.index, span.shape[1]), last

    @planned
    def pieces(self, span: Span, size: int | None, parts: int = 1) -> Segments:
        """Cuts these rows into segments, a multiple of `parts`; cached on `span`."""
        if size is not None and size < 1:
            raise ValueError(f"a segment of {size} tokens is empty; use 1 or more, or null")

        def build() -> Segments:
            return _segments(span, self.cutter(span, size, parts), parts)

        return span.cache.get(("relay", self.cutter, size, parts), build)


def _segments(span: Span, index: Tensor, parts: int) -> Segments:
    index = F.pad(index, (0, 0, 0, -index.shape[1] % parts), value=-1)
    flat = index.flatten(1)
    source = flat.clamp_min(0)
    host = span.host()
    device = span.pos.device
    segment_span = Span(
        host.pos.gather(1, source),
        host.doc.gather(1, source).masked_fill(flat < 0, PADDING),
        host.role.gather(1, source),
    )
    slots = torch.arange(1, index.shape[2] + 1)
    filled = torch.where(segment_span.valid().view(index.shape), slots, 0).amax(2)
    there = segment_span.moved(lambda tensor: to_device(tensor, device))
    return Segments(index, there, filled.numpy())


def gather_segments(x: Tensor, index: Tensor) -> Tensor:
    """Moves tokens into their slots, [B, T, ...] -> [B, L, ...]; empty slots are 0."""
    slots = _expanded(to_device(index.flatten(1), x.device), x)
    return torch.where(slots >= 0, x.gather(1, slots.clamp_min(0)), 0)


def scatter_segments(y: Tensor, index: Tensor, tokens: int) -> Tensor:
    """Moves slots back to their tokens, [B, L, ...] -> [B, T, ...]; 0 where there is no slot."""
    slots = _expanded(to_device(index.flatten(1), y.device), y)
    # One position more than there are tokens: it takes the output of all empty slots.
    blank = y.new_zeros(y.shape[0], tokens + 1, *y.shape[2:])
    return blank.scatter(1, torch.where(slots >= 0, slots, tokens), y)[:, :tokens]


def run_segments(
    step: StepFunction,
    xs: Tensors,
    state: tuple[Tensor, ...],
    pieces: Segments,
    *,
    depth: int | None,
    first: int = 0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Runs a step over consecutive segments.

    A row whose segment is empty keeps its state. Segments that are empty in all rows are skipped,
    except the first: every rank must build the same graph.

    Args:
        xs: tensors [B, L, ...].
        pieces: the segments of these rows, or consecutive ones among them.
        first: the number of their first in the row.

    Returns:
        (y [B, L, ...], 0 at padding; the state after the last segment).
    """
    size = pieces.index.shape[2]
    outputs = []
    for number, widest in enumerate(pieces.filled.max(0).tolist()):
        if number and not widest:
            outputs.append(torch.zeros_like(outputs[0]))
            continue
        part = slice(number * size, number * size + max(1, widest))
        span = pieces.span.cut(lambda addresses, part=part: addresses[:, part])
        alive = to_device(pieces.filled[:, number] > 0, xs[0].device)
        in_row = number + first
        if depth is not None and in_row and in_row % depth == 0:
            detached = [tensor.detach() for tensor in state]
            state = _select_rows(alive, detached, state)
        y, after = step(tuple(x[:, part] for x in xs), span, state)
        assert [(s.shape, s.dtype) for s in after] == [(s.shape, s.dtype) for s in state], (
            "a step keeps its state's shapes"
        )
        state = _select_rows(alive, after, state)
        per_feature = y.dim() - 2
        y = torch.where(span.valid().view(*span.shape, *[1] * per_feature), y, 0)
        outputs.append(F.pad(y, (*[0, 0] * per_feature, 0, size - y.shape[1])))
    return torch.cat(outputs, 1), state


def _select_rows(alive: Tensor, a: Tensors, b: Tensors) -> tuple[Tensor, ...]:
    """Takes the rows of `a` where `alive` [B] is true, else those of `b`; tensors [B, ...]."""
    selected = []
    for x, y in zip(a, b, strict=True):
        selected.append(torch.where(alive.view(-1, *[1] * (x.dim() - 1)), x, y))
    return tuple(selected)


def sequential_modules(model: nn.Module) -> set[nn.Module]:
    """Returns all modules that run inside the steps of a SequentialScan.

    They are never spread over ranks: ranks call them unequal numbers of times, so a collective
    inside would never meet its counterpart.

    The owner of a SequentialScan names them by its hook `sequential_parts(parent)`;
    `parent` is the module that contains it (itself, for the outermost).
    """
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        parent = model.get_submodule(path.rpartition(".")[0])
        for part in hook(module, "sequential_parts")(parent):
            inside.update(part.modules())
    return inside


def misfits(model: nn.Module) -> list[str]:
    """Returns one sentence for each layer that cannot run inside the steps of a SequentialScan.

    Those are layers with an auxiliary loss: each pass overwrites that of the pass before.
    """
    inside = sequential_modules(model)
    sentences = []
    for name, module in model.named_modules():
        if module in inside and hook(module, "auxiliary") is not None:
            sentences.append(
                f"{name} ({type(module).__name__}) leaves a loss of its own at each pass, and here"
                " is passed through piece by piece: all losses but the last would be lost; choose"
                " another layer, or another memory"
            )
    return sentences


def _expanded(index: Tensor, x: Tensor) -> Tensor:
    """[B, L] -> [B, L, ...], with the trailing shape of x."""
    per_feature = [1] * (x.dim() - 2)
    return index.view(*index.shape, *per_feature).expand(-1, -1, *x.shape[2:])
