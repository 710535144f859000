"""Plans the blocks of (queries x keys) to compute, so that cost follows the visible area.

The two token axes are cut into pieces (long unbroken runs, and mixed pieces of at most LEAF
tokens), and pairs of pieces are halved until the mask can say EMPTY (skipped), FULL (one call
without a mask), or a causal triangle between two runs, or of one document with itself (one call
with the kernel's own causal flag). The rest are blocks of at most LEAF x LEAF that need a dense
mask.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from models.masks.algebra import EMPTY, FAR, FULL, PARTIAL, Bounds, Mask
from models.plans import planned
from models.span import PADDING, Span

LEAF = 512  # tokens on the side of the largest block that is computed with a dense mask
# Longest piece that is made of several runs: on a CPU a call takes little beside its pairs.
MIXED = {"cpu": 128}

# From MANY rows of at most SHORT tokens on, rows are computed together.
MANY = 8
SHORT = 128

FULL_TILE = "full"
CAUSAL_TILE = "triangle"
PARTIAL_TILE = "masked"


class Tile(NamedTuple):
    """Rows [r0, r1), queries [q0, q1), keys [k0, k1) of the local tensors, and their visibility.

    CAUSAL_TILE: as many queries as keys, query i sees keys 0..i.
    """

    r0: int
    r1: int
    q0: int
    q1: int
    k0: int
    k1: int
    kind: str


class RowTokens:
    """Addresses of one row on the host, its pieces, and the bounds of any stretch of them.

    Args:
        addresses: positions, documents and roles, [T] each.
        leaf: the longest piece of several runs; 0 keeps every run apart.
    """

    def __init__(self, addresses: Sequence[np.ndarray], leaf: int):
        pos, doc, role = addresses
        self.pos = pos
        self.doc = doc
        self.role = role
        size = len(pos)
        breaks = 1 + np.flatnonzero(
            (np.diff(doc) != 0) | (np.diff(pos) != 1) | (np.diff(role) != 0)
        )
        edges = [0, *breaks.tolist(), size] if size else [0]
        self.pieces: list[tuple[int, int]] = []
        for start, stop in zip(edges[:-1], edges[1:]):
            last = self.pieces[-1] if self.pieces else None
            small = last is not None and stop - last[0] <= leaf
            if last is not None and small:
                self.pieces[-1] = (last[0], stop)
            else:
                self.pieces.append((start, stop))
        opens = [doc[start] != doc[start - 1] for start, _ in self.pieces[1:]]
        # Numbers of the pieces, from 1 on, that begin another document than the one before ends.
        self.openings = [1 + number for number, other in enumerate(opens) if other]

    def middle(self, first: int, last: int) -> int:
        """Returns where to cut pieces [first, last): about halfway, between documents if it can."""
        halfway = (first + last) // 2
        place = bisect_left(self.openings, halfway)
        near = [
            each for each in self.openings[max(place - 1, 0) : place + 1] if first < each < last
        ]
        return min(near, key=lambda each: abs(each - halfway), default=halfway)

    def box(self, start: int, stop: int) -> Bounds:
        pos = self.pos[start:stop]
        doc = self.doc[start:stop]
        role = self.role[start:stop]
        low = int(pos.min())
        high = int(pos.max())
        doc_low = int(doc.min())
        doc_high = int(doc.max())
        run = (
            doc_low == doc_high
            and int(pos[0]) == low
            and high - low + 1 == stop - start
            and bool((np.diff(pos) == 1).all())
        )
        return Bounds(low, high, doc_low, doc_high, int(role.min()), int(role.max()), run)


def block_outlook(mask: Mask, q: Bounds, k: Bounds) -> int:
    if PADDING in (q.doc_high, k.doc_high):
        return EMPTY
    clean = q.doc_low != PADDING and k.doc_low != PADDING
    return min(mask.coverage(q, k), FULL if clean else PARTIAL)


class TilePlanner:
    """Plans one row: halves pairs of pieces until the mask is sure of them."""

    def __init__(self, mask: Mask, q: RowTokens, k: RowTokens):
        self.mask = mask
        self.q = q
        self.k = k
        self.blocks: list[tuple[int, int, int, int, str]] = []
        if q.pieces and k.pieces:
            self._pieces(0, len(q.pieces), 0, len(k.pieces))

    def _pieces(self, qa: int, qb: int, ka: int, kb: int) -> None:
        """Plans a stretch of query pieces against one of key pieces; halves the longer one."""
        q0 = self.q.pieces[qa][0]
        q1 = self.q.pieces[qb - 1][1]
        k0 = self.k.pieces[ka][0]
        k1 = self.k.pieces[kb - 1][1]
        if qb - qa == 1 and kb - ka == 1:
            return self.inside(q0, q1, k0, k1)
        q = self.q.box(q0, q1)
        k = self.k.box(k0, k1)
        look = block_outlook(self.mask, q, k)
        if look == FULL:
            self.blocks.append((q0, q1, k0, k1, FULL_TILE))
        elif look == PARTIAL and q == k and self._is_triangle(q, q0, q1, k0, k1):
            self.triangle(q0, q1, k0, k1)
        elif look == PARTIAL and qb - qa >= kb - ka:
            middle = self.q.middle(qa, qb)
            self._pieces(qa, middle, ka, kb)
            self._pieces(middle, qb, ka, kb)
        elif look == PARTIAL:
            middle = self.k.middle(ka, kb)
            self._pieces(qa, qb, ka, middle)
            self._pieces(qa, qb, middle, kb)

    def _is_triangle(self, box: Bounds, q0: int, q1: int, k0: int, k1: int) -> bool:
        """Tells whether tokens of one document, with gaps, see those before them and themselves."""
        tokens = self.q.pos[q0:q1]
        same = np.array_equal(tokens, self.k.pos[k0:k1])
        if not same or box.doc_low != box.doc_high or not bool((np.diff(tokens) > 0).all()):
            return False
        # What a mask says of a run holds for any tokens of it.
        run = box._replace(run=True)
        band = self.mask.band(run, run)
        return band is not None and band[0] == 0 and band[1] >= box.pos_high - box.pos_low

    def triangle(self, q0: int, q1: int, k0: int, k1: int) -> None:
        """Plans tokens against themselves, of which query i sees keys 0..i."""
        self.blocks.append((q0, q1, k0, k1, CAUSAL_TILE))

    def inside(self, q0: int, q1: int, k0: int, k1: int) -> None:
        """Plans one piece against one piece."""
        q = self.q.box(q0, q1)
        k = self.k.box(k0, k1)
        look = block_outlook(self.mask, q, k)
        if look == EMPTY:
            return
        if look == FULL:
            self.blocks.append((q0, q1, k0, k1, FULL_TILE))
            return
        band = self.mask.band(q, k) if q.run and k.run else None
        if (
            band is not None
            and band[0] > max(q.pos_low - k.pos_high, -FAR)
            and band[1] >= q.pos_high - k.pos_low
        ):
            return self._causal(q0, q1, k0, k1, q.pos_low - k.pos_low - band[0])
        if q1 - q0 <= LEAF and k1 - k0 <= LEAF:
            self.blocks.append((q0, q1, k0, k1, PARTIAL_TILE))
        elif q1 - q0 >= k1 - k0:
            middle = q0 + _half(q1 - q0)
            self.inside(q0, middle, k0, k1)
            self.inside(middle, q1, k0, k1)
        else:
            middle = k0 + _half(k1 - k0)
            self.inside(q0, q1, k0, middle)
            self.inside(q0, q1, middle, k1)

    def _causal(self, q0: int, q1: int, k0: int, k1: int, shift: int) -> None:
        """Query i sees keys 0..i+shift: a full rectangle, and triangles on the diagonal."""
        q0 -= min(shift, 0)  # the first queries see nothing
        # Keys before this one are seen by every remaining query.
        seen = min(k1, k0 + max(shift, 0))
        side = min(q1 - q0, k1 - seen)
        stretches = (
            (q0, q1, k0, seen, FULL_TILE),
            (q0, q0 + side, seen, seen + side, CAUSAL_TILE),
            (q0 + side, q1, seen, k1, FULL_TILE),
        )
        self.blocks += [b for b in stretches if b[0] < b[1] and b[2] < b[3]]


def _half(size: int) -> int:
    """Returns about half, a multiple of LEAF where the size exceeds it."""
    if size > LEAF:
        return max(LEAF, size // 2 // LEAF * LEAF)
    return size // 2


def join_tiles(
    blocks: list[tuple[int, int, int, int, str]],
) -> list[tuple[int, int, int, int, str]]:
    """Joins adjacent full blocks along the keys, then along the queries; masked ones along keys."""
    for here, there in ((0, 2), (2, 0)):
        joined: list[Any] = []
        for block in sorted(blocks, key=lambda b: (b[4], b[here], b[here + 1], b[there])):
            last: Any = joined[-1] if joined else None
            same = (
                last is not None
                and last[4] == block[4]
                and last[here : here + 2] == block[here : here + 2]
            )
            near = last is not None and here == 0 and block[3] - last[2] <= 4 * LEAF
            free = block[4] == FULL_TILE or (block[4] == PARTIAL_TILE and near)
            if last is not None and same and free and last[there + 1] == block[there]:
                joined[-1] = (*last[: there + 1], block[there + 1], *last[there + 2 :])
            else:
                joined.append(block)
        blocks = joined
    return sorted(blocks, key=lambda b: b[:4])


def on_host(span: Span) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in span.host().addresses()]


@planned
def plan_tiles(mask: Mask, span: Span, kv_span: Span) -> list[Tile]:
    """Returns the blocks that queries need of keys; cached on `span` for other layers."""
    return span.cache.get(("tiles", mask), lambda: _plan(mask, span, kv_span), kv_span)


@planned
def plan_rows(mask: Mask, span: Span, kv_span: Span) -> list[Tile]:
    """As `plan_tiles`, with many short rows in one masked block.

    There a block takes longer to call than to compute.
    """
    rows, queries = span.shape
    keys = kv_span.shape[1]
    if rows < MANY or not 0 < max(queries, keys) <= SHORT:
        return plan_tiles(mask, span, kv_span)

    def build() -> list[Tile]:
        most_rows = max(1, LEAF * LEAF // max(1, queries * keys))
        return _stack(plan_tiles(mask, span, kv_span), most_rows)

    return span.cache.get(("stacked tiles", mask), build, kv_span)


def _stack(blocks: list[Tile], most: int) -> list[Tile]:
    """Merges blocks of different rows into masked ones of at most `most` rows.

    A merged block covers all queries and keys that any of its rows needs.
    """
    stacked: list[Tile] = []
    for block in sorted(blocks):
        last = stacked[-1] if stacked else None
        if last is None or block.r1 - last.r0 > most:
            stacked.append(block)
            continue
        q0 = min(last.q0, block.q0)
        q1 = max(last.q1, block.q1)
        k0 = min(last.k0, block.k0)
        k1 = max(last.k1, block.k1)
        both_full = last[2:] == block[2:] == (q0, q1, k0, k1, FULL_TILE)
        kind = FULL_TILE if both_full and last.r1 == block.r0 else PARTIAL_TILE
        stacked[-1] = Tile(last.r0, max(last.r1, block.r1), q0, q1, k0, k1, kind)
    return stacked


def _plan(mask: Mask, span: Span, kv_span: Span) -> list[Tile]:
    queries = on_host(span)
    keys = on_host(kv_span)
    labels = row_labels(queries, keys)
    mixed = MIXED.get(span.pos.device.type, LEAF)
    plans: dict[bytes, list[tuple[int, int, int, int, str]]] = {}
    blocks = []
    start = 0
    while start < len(labels):
        label = labels[start]
        stop = start + 1
        while stop < len(labels) and labels[stop] == label:
            stop += 1
        if label not in plans:
            row_queries = RowTokens([each[start] for each in queries], mixed)
            row_keys = RowTokens([each[start] for each in keys], mixed)
            plans[label] = join_tiles(TilePlanner(mask, row_queries, row_keys).blocks)
        for block in plans[label]:
            blocks.append(Tile(start, stop, *block))
        start = stop
    return blocks


def row_labels(queries: list[np.ndarray], keys: list[np.ndarray]) -> list[bytes]:
    """Returns what the plan of each row depends on; rows of equal labels share a plan.

    Numbers of documents are counted from the least of their row: masks only compare them.

    Args:
        queries, keys: positions, documents and roles, [B, T] and [B, S] each.
    """
    documents = np.concatenate([queries[1], keys[1]], 1)
    real = documents != PADDING
    highest = np.iinfo(np.int64).max
    least = documents.min(1, keepdims=True, initial=highest, where=real)
    documents = np.where(real, documents - least, PADDING)
    whole = np.concatenate([queries[0], keys[0], documents, queries[2], keys[2]], 1)
    return [row.tobytes() for row in whole]


def split_tile(block: Tile, side: int) -> list[Tile]:
    """Cuts a block into blocks of at most side x side.

    For kernels that hold all scores of a block at once.
    """
    if block.q1 - block.q0 <= side and block.k1 - block.k0 <= side:
        return [block]
    parts = []
    for q0 in range(block.q0, block.q1, side):
        for k0 in range(block.k0, block.k1, side):
            q1 = min(q0 + side, block.q1)
            k1 = min(k0 + side, block.k1)
            kind = block.kind
            if kind == CAUSAL_TILE:
                query_offset = q0 - block.q0
                key_offset = k0 - block.k0
                if key_offset > query_offset:
                    continue  # above the diagonal
                kind = CAUSAL_TILE if query_offset == key_offset else FULL_TILE
            parts.append(Tile(block.r0, block.r1, q0, q1, k0, k1, kind))
    return parts
