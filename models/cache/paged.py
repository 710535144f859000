"""Paged cache: rows hold pages of one pool, and share those that are equal.

Samples of one prompt share its pages until they write to them. Where the tokens of a piece are
announced, rows that begin alike share the full pages of what they have in common.

Letters: B rows, T tokens at hand, S slots, N tokens of a page, n pages of a row.
"""

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.cache.base import KVCache, KVCacheFactory
from models.cache.page_storage import PageStorage
from models.cache.paged_pool import PagePool, PoolFull
from models.cache.slots import SlotTable
from models.masks.algebra import Mask
from models.ranges import Count, Piece
from models.scores import Tensors
from models.span import Span

EVERYTHING = Mask()
FIRST_PAGES = 64


class Paged(KVCacheFactory):
    """`cache=paged`: a pool of pages for each attention, shared by all rows and batches.

    Args:
        page_tokens: N; a row wastes less than a page.
        pages: pages of a pool; null: it doubles when it is full.

    Source: Kwon et al. 2023, PagedAttention (arXiv:2309.06180). Pages are gathered before the
    attention, where theirs reads them in its kernel.
    """

    def __init__(self, page_tokens: Piece = 16, pages: Count | None = None):
        if page_tokens < 1 or (pages is not None and pages < 1):
            raise ValueError(
                f"cache.page_tokens={page_tokens}, cache.pages={pages}: these are counts; use 1 or"
                " more"
            )
        self.page_tokens = page_tokens
        self.pages = pages
        self.bounded = pages is not None
        self.announced: Tensor | None = None
        self._pools: dict[str, tuple[PagePool, PageStorage]] = {}
        self._names = itertools.count()

    def announce(self, tokens: Tensor | None) -> None:
        """See KVCacheFactory; equal pages are found by their tokens."""
        self.announced = tokens

    def least_bytes(self, tokens: int, numbers: int, itemsize: int) -> int:
        """See KVCacheFactory; rows may share all of their pages."""
        return 0

    def admits(self, lengths: Sequence[int]) -> bool:
        """See KVCacheFactory; equal beginnings count for each row."""
        if self.pages is None:
            return True
        needed = sum(-(-(length + 1) // self.page_tokens) for length in lengths)
        free = [pool.free_pages() for pool, _ in self._pools.values()]
        return needed <= min(free, default=self.pages)

    def create(self, place: str, mask: Mask, slots: SlotTable) -> "PagedCache":
        """See KVCacheFactory."""
        if place not in self._pools:
            pages = self.pages or FIRST_PAGES
            books = PagePool(pages, self.page_tokens), PageStorage(pages, self.page_tokens)
            self._pools[place] = books
        return PagedCache(self, *self._pools[place])

    def name(self) -> int:
        """Returns a name for a row that no other row has."""
        return next(self._names)


class PagedCache(KVCache):
    """Rows of a pool; their pages go back to it with the cache."""

    def __init__(self, factory: Paged, pool: PagePool, storage: PageStorage):
        self.factory = factory
        self.pool = pool
        self.storage = storage
        # a table of its own: pages hold every token of a row
        self.slots = SlotTable(EVERYTHING)
        self.names: list[int] = []
        weakref.finalize(self, _release, pool, self.names)

    def append(self, payload: Tensors, span: Span) -> None:
        """See KVCache."""
        self._append(payload, span, self.factory.announced)

    def _append(self, payload: Tensors, span: Span, announced: Tensor | None) -> None:
        if not self.names:
            self._open(span.shape[0])
        if announced is not None and announced.shape != span.shape:
            announced = None  # what a layer made of the tokens, such as summaries
        self.slots.place(span)
        valid = span.valid()
        places: list[int] = []
        written = torch.zeros_like(valid)
        for row, name in enumerate(self.names):
            there = valid[row].nonzero()[:, 0]
            tokens = self._tokens(announced, span, row, there)
            found = 0
            if not self.pool.length(name):
                found = self._found(name, tokens)
            places += self._extended(name, tokens[found:])
            written[row, there[found:]] = True
        rows, taken = written.nonzero(as_tuple=True)
        if places:
            self.storage.write(places, [came[rows, taken] for came in payload])

    def read(self) -> tuple[Tensors, Span]:
        """See KVCache."""
        span = self.slots.read()
        most = -(-span.shape[1] // self.pool.page_tokens)
        pages = torch.zeros(len(self.names), most, dtype=torch.long, device=span.pos.device)
        for row, name in enumerate(self.names):
            table = self.pool.table(name)
            pages[row, : len(table)] = torch.tensor(table, device=pages.device)
        return [tensor[:, : span.shape[1]] for tensor in self.storage.gather(pages)], span

    def release(self) -> None:
        """See KVCache."""
        _release(self.pool, self.names)
        self.names.clear()

    def select(self, rows: Tensor) -> None:
        """See KVCache; a row that comes again shares its pages with the first."""
        names: list[int] = []
        for row in rows.tolist():
            name = self.names[row]
            if name in names:
                sample = self.factory.name()
                self.pool.fork(name, sample)
                name = sample
            names.append(name)
        for name in self.names:
            if name not in names:
                self.pool.release(name)
        self.names[:] = names
        self.slots.select(rows)

    def join(self, other: Any) -> None:
        """See KVCache; both are of one pool, so no page moves."""
        assert other.pool is self.pool, "caches of different factories share no pool"
        self.names += other.names
        other.names.clear()
        self.slots.join(other.slots)

    def bytes(self) -> int:
        """See KVCache: of the pages that these rows hold; a shared one counts once."""
        if not self.storage.tensors:
            return 0
        return len(self._held()) * self.storage.page_bytes()

    def fits(self, tokens: int) -> bool:
        """See KVCache."""
        return self.factory.pages is None or self.pool.fits(self.names, tokens)

    def counters(self) -> Mapping[str, int]:
        """See KVCache."""
        held = self._held()
        shared = sum(self.pool.readers(page) > 1 for page in held)
        return {"pages": len(held), "pages_shared": shared}

    def export_state(self) -> tuple[Tensors, Span]:
        """See KVCache."""
        return self.read()

    def import_state(self, payload: Tensors, span: Span) -> None:
        """See KVCache."""
        self._append(payload, span, None)

    def _held(self) -> set[int]:
        return {page for name in self.names for page in self.pool.table(name)}

    def _open(self, rows: int) -> None:
        for _ in range(rows):
            name = self.factory.name()
            self.pool.open(name, ())
            self.names.append(name)

    def _tokens(self, announced: Tensor | None, span: Span, row: int, there: Tensor) -> list[int]:
        """Returns what a key and a value are computed from beside the tokens before: the token and
        its position; numbers that nothing else has where no token was announced."""
        if announced is None:
            return [-1 - self.factory.name() for _ in range(len(there))]
        return (announced[row, there] + (span.pos[row, there] << 32)).tolist()

    def _found(self, name: int, tokens: list[int]) -> int:
        """Gives a new row the pages that other rows filled with the same tokens."""
        self.pool.release(name)
        # one token more than there are: all are computed already, the last one too
        return self.pool.open(name, [*tokens, -1])

    def _extended(self, name: int, tokens: list[int]) -> list[int]:
        try:
            extension = self.pool.extend(name, tokens)
        except PoolFull as error:
            if self.factory.pages is not None:
                raise PoolFull(error.missing) from error
            more = max(error.missing, self.pool.pages)
            self.pool.grow(more)
            self.storage.grow(more)
            extension = self.pool.extend(name, tokens)
        if extension.copied is not None:
            self.storage.copy(*extension.copied)
        return extension.slots


def _release(pool: PagePool, names: list[int]) -> None:
    for name in names:
        pool.release(name)
