"""Slots: which tokens of each row a cache holds, by address, shared by all layers that agree.

Tokens of a row take the next free slots of the row in the order in which they come; padding takes
none, so rows of uneven length stand side by side. When the slots are full, tokens that the mask
shows to no later query are dropped; only then is more memory taken. A window therefore costs its
own length, whatever the length of the text.

Letters: B rows, T tokens at hand, S slots.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.masks.algebra import EMPTY, FAR, FULL, Bounds, Mask
from models.span import LAST_ROLE, PADDING, TEXT, Span, to_device

BLOCK = 256  # slots that are added at once


class Placement(NamedTuple):
    """The steps by which a cache takes the tokens at hand: keep, then grow, then write.

    Attributes:
        keep: [B, K] int64, the slots to keep, in their new order; None: all stay where they are.
        capacity: S afterwards.
        start: the slot of the first token in every row, where all rows take all T tokens side by
            side; None: `rows`, `tokens` and `slots` say which token goes where.
    """

    keep: Tensor | None
    capacity: int
    start: int | None
    rows: Tensor
    tokens: Tensor
    slots: Tensor


class SlotTable:
    """Addresses of the tokens that caches hold.

    Args:
        mask: by which queries read; what it shows to no later query may be dropped.
        block: slots that are added at once.

    Attributes:
        filled: slots in use, for each row.
    """

    def __init__(self, mask: Mask, block: int = BLOCK):
        self.mask = mask
        self.block = block
        self.filled: list[int] = []
        self.addresses: Span | None = None
        self._limit = 0
        self._placed: tuple[Span, Placement] | None = None
        self._visible: Span | None = None

    @property
    def capacity(self) -> int:
        """S."""
        return 0 if self.addresses is None else self.addresses.shape[1]

    def place(self, span: Span) -> Placement:
        """Gives the tokens of `span` their slots; several caches that ask get the same answer."""
        if self._placed is None or self._placed[0] is not span:
            self._placed = span, self._place(span)
            self._visible = None
        return self._placed[1]

    def read(self) -> Span:
        """Returns the addresses [B, S'] of the slots in use; padding where a row has fewer.

        The same object until tokens come: layers find by it what others derived.
        """
        if self._visible is None:
            assert self.addresses is not None, "nothing was placed yet"
            most = max(self.filled, default=0)
            self._visible = self.addresses.map(lambda addresses: addresses[:, :most])
        return self._visible

    def select(self, rows: Tensor) -> None:
        """Keeps these rows, in this order."""
        if self.addresses is None:
            return
        self.addresses = self.addresses.map(lambda addresses: addresses[rows])
        self.filled = [self.filled[row] for row in rows.tolist()]
        self._forget()

    def join(self, other: "SlotTable") -> None:
        """Adds the rows of another table below."""
        if self.addresses is None or other.addresses is None:
            return
        capacity = max(self.capacity, other.capacity)
        above = padded(self.addresses, capacity)
        self.addresses = stacked(above, padded(other.addresses, capacity))
        self.filled = self.filled + other.filled
        self._forget()

    def restore(self, addresses: Span) -> None:
        """Takes over addresses [B, S] as `read` gave them."""
        self.addresses = addresses.map(Tensor.clone)
        self.filled = addresses.valid().sum(1).tolist()
        self._forget()

    def _forget(self) -> None:
        self._placed = None
        self._visible = None
        self._limit = 0

    def _place(self, span: Span) -> Placement:
        valid = span.host().valid()
        counts = valid.sum(1).tolist()
        if self.addresses is None:
            self.filled = [0] * span.shape[0]
        keep = None
        capacity = self.capacity
        needed = max(have + more for have, more in zip(self.filled, counts, strict=True))
        if needed > min(self._limit, capacity):
            keep, capacity = self._room(counts, needed)
        self._resize(span, keep, capacity)
        placement = self._assign(span, valid, counts, keep, capacity)
        assert self.addresses is not None
        for table, came in zip(self.addresses.addresses(), span.addresses(), strict=True):
            write(table, came, placement)
        self.filled = [have + more for have, more in zip(self.filled, counts, strict=True)]
        # After a long piece more than a window's worth may be held: look again at the next token.
        self._limit = 0 if span.shape[1] > 1 else capacity
        return placement

    def _room(self, counts: list[int], needed: int) -> tuple[Tensor | None, int]:
        """Returns (slots to keep or None, the capacity that is needed)."""
        kept = [self._readable(row) for row in range(len(self.filled))]
        most = max(len(slots) for slots in kept)
        dropped = max(self.filled, default=0) - most
        if not dropped:
            grown = max(self.capacity, _rounded(needed, self.block))
            return None, grown
        # Half a block more than is needed: else a window as long as its slots drops at each token.
        capacity = _rounded(most + max(counts) + self.block // 2, self.block)
        keep = torch.zeros(len(kept), most, dtype=torch.long)
        for row, slots in enumerate(kept):
            keep[row, : len(slots)] = torch.as_tensor(slots)
        self.filled = [len(slots) for slots in kept]
        return keep, capacity

    def _resize(self, span: Span, keep: Tensor | None, capacity: int) -> None:
        if self.addresses is None:
            blank = span.pos.new_zeros(span.shape[0], capacity)
            # Three tensors of their own: they are written to in place.
            self.addresses = Span(blank, blank + PADDING, blank + TEXT)
            return
        if keep is not None:
            slots = to_device(keep, span.pos.device)
            kept = self.addresses.map(lambda addresses: addresses.gather(1, slots))
            line = torch.arange(keep.shape[1], device=span.pos.device)
            filled = to_device(self.filled, span.pos.device)
            doc = kept.doc.masked_fill(line >= filled[:, None], PADDING)
            self.addresses = Span(kept.pos, doc, kept.role)
        if self.capacity != capacity:
            self.addresses = padded(self.addresses, capacity)

    def _assign(
        self, span: Span, valid: Tensor, counts: list[int], keep: Tensor | None, capacity: int
    ) -> Placement:
        rows, tokens = span.shape
        none = span.pos.new_zeros(0)
        if counts == [tokens] * rows and len(set(self.filled)) == 1:
            return Placement(keep, capacity, self.filled[0], none, none, none)
        row, token = valid.nonzero(as_tuple=True)
        slot = (valid.long().cumsum(1) - 1 + torch.tensor(self.filled)[:, None])[row, token]
        there = [to_device(index, span.pos.device) for index in (row, token, slot)]
        return Placement(keep, capacity, None, *there)

    def _readable(self, row: int) -> np.ndarray:
        """Returns the slots of a row that a later query may read."""
        filled = self.filled[row]
        if not filled:
            return np.zeros(0, dtype=np.int64)
        assert self.addresses is not None
        fields = [tensor[row, :filled].cpu().numpy() for tensor in self.addresses.addresses()]
        keep = np.zeros(filled, dtype=bool)
        _mark(self.mask, _later(fields), fields, 0, filled, keep)
        return np.flatnonzero(keep)


def _later(fields: list[np.ndarray]) -> tuple[Bounds, Bounds]:
    """Returns bounds of all queries to come: of the last document, and of those after it.

    Documents of a row are numbered in order, and so are the tokens of a document.
    """
    pos, doc, _ = fields
    last = int(doc.max())
    next_pos = int(pos[doc == last].max()) + 1
    same = Bounds(next_pos, FAR, last, last, TEXT, LAST_ROLE, False)
    later = Bounds(0, FAR, last + 1, FAR, TEXT, LAST_ROLE, False)
    return same, later


def _mark(
    mask: Mask,
    later: tuple[Bounds, Bounds],
    fields: list[np.ndarray],
    start: int,
    stop: int,
    keep: np.ndarray,
) -> None:
    """Marks the slots from start to stop that one of these queries may read, by halves."""
    pos, doc, role = (field[start:stop] for field in fields)
    keys = Bounds(
        int(pos.min()),
        int(pos.max()),
        int(doc.min()),
        int(doc.max()),
        int(role.min()),
        int(role.max()),
        False,
    )
    seen = [mask.coverage(queries, keys) for queries in later]
    if max(seen) == EMPTY:
        return
    if max(seen) == FULL or stop - start == 1:
        keep[start:stop] = True
        return
    middle = (start + stop) // 2
    _mark(mask, later, fields, start, middle, keep)
    _mark(mask, later, fields, middle, stop, keep)


def stacked(above: Span, below: Span) -> Span:
    """Returns the addresses of the rows of both."""
    pos = torch.cat([above.pos, below.pos])
    doc = torch.cat([above.doc, below.doc])
    role = torch.cat([above.role, below.role])
    return Span(pos, doc, role)


def padded(addresses: Span, capacity: int) -> Span:
    """Returns the addresses with empty slots after them, or without their last ones."""
    more = capacity - addresses.shape[1]
    if more <= 0:
        return addresses.map(lambda tensor: tensor[:, :capacity].clone())
    blank = addresses.pos.new_zeros(addresses.shape[0], more)
    return addresses.join(Span(blank, blank + PADDING, blank + TEXT))


def write(table: Tensor, came: Tensor, placement: Placement) -> None:
    """Writes what came with the tokens at hand, [B, T, ...], into its slots [B, S, ...]."""
    if placement.start is not None:
        table[:, placement.start : placement.start + came.shape[1]] = came
    else:
        table[placement.rows, placement.slots] = came[placement.rows, placement.tokens]


def _rounded(count: int, block: int) -> int:
    """Rounds up to a multiple of `block`."""
    return -(-count // block) * block
