"""Pool of fixed pages that sequences share: tables, reference counts and prefix sharing.

A sequence owns a table of pages and not one stretch of memory, so it reserves at most one page more
than it fills. Sequences that begin with the same tokens share the full pages of that prefix; the
samples of one prompt share the last page too, until one of them writes to it.

This file keeps the books alone; models/cache/page_storage.py holds the tensors.
"""

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import NamedTuple


class PoolFull(Exception):
    """The pool has too few free pages for what was asked; nothing was changed.

    Attributes:
        missing: pages that would have to be freed first.
    """

    def __init__(self, missing: int):
        super().__init__(f"{missing} more free pages are needed")
        self.missing = missing


class Extension(NamedTuple):
    """Places for new tokens of a sequence.

    Attributes:
        slots: for each token, page * page_tokens + its place in the page.
        copied: (source, target) if a shared page has to be copied before anything is written, else
            None. At most the last page of a table is partly filled, so one copy is enough.
    """

    slots: list[int]
    copied: tuple[int, int] | None


@dataclass
class _Sequence:
    """The table of a sequence and its tokens; `digests[i]` names the first i + 1 full pages."""

    pages: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)


class PagePool:
    """Hands out pages, counts who reads them, and takes them back.

    Args:
        pages: pages of the pool.
        page_tokens: tokens of a page.
        salt: what keys and values depend on beside the tokens, such as an adapter. Pools with
            different salts name equal tokens differently.

    Every sequence begins at position 0 of its document: keys hold their positions, so a page may be
    shared only by sequences that have all tokens before it in common. The name of a full page is
    therefore a hash of its tokens and of the name of the page before it.

    Source: Kwon et al. 2023 (arXiv:2309.06180). Their later code keeps freed pages findable until
    they are used again; here a page is findable while a sequence holds it, so that a pool that all
    have left equals a new one.
    """

    def __init__(self, pages: int, page_tokens: int, *, salt: bytes = b""):
        if pages < 1 or page_tokens < 1:
            raise ValueError(
                f"cache.pages={pages} and cache.page_tokens={page_tokens} are counts; use 1 or more"
            )
        self.pages = pages
        self.page_tokens = page_tokens
        self._root = hashlib.blake2b(salt, digest_size=16).digest()
        # A heap: the lowest number goes out first, so equal histories give equal tables, and ranks
        # that keep the same books agree without a word.
        self._free = list(range(pages))
        heapify(self._free)
        self._readers = [0] * pages
        self._sequences: dict[Hashable, _Sequence] = {}
        self._page_of_digest: dict[bytes, int] = {}
        self._digest_of_page: dict[int, bytes] = {}

    def open(self, name: Hashable, prompt: Sequence[int]) -> int:
        """Begins a sequence with the pages of its prompt that the pool already holds.

        The last token of a prompt is never taken from the pool: its logits have to be computed.

        Returns:
            The number of leading tokens of the prompt whose keys and values are there; `extend`
            takes the others.
        """
        assert name not in self._sequences, f"sequence {name!r} is open already"
        sequence = _Sequence()
        digest = self._root
        start = 0
        while start + self.page_tokens < len(prompt):
            tokens = list(prompt[start : start + self.page_tokens])
            digest = self._digest(digest, tokens)
            page = self._page_of_digest.get(digest)
            if page is None:
                break
            self._readers[page] += 1
            sequence.pages.append(page)
            sequence.tokens += tokens
            sequence.digests.append(digest)
            start += self.page_tokens
        self._sequences[name] = sequence
        return start

    def extend(self, name: Hashable, tokens: Sequence[int]) -> Extension:
        """Finds places for the next tokens of a sequence.

        The caller writes them before it opens another sequence or reads this one: full pages can be
        found by others from now on.

        Raises:
            PoolFull: there are too few free pages; nothing was changed.
        """
        sequence = self._sequences[name]
        length = len(sequence.tokens)
        copies = self._must_copy(sequence)
        total = self._pages_for(length + len(tokens))
        fresh = total - len(sequence.pages)
        needed = fresh
        if copies and len(tokens):
            needed += 1
        if needed > len(self._free):
            raise PoolFull(needed - len(self._free))
        copied = None
        if copies and len(tokens):
            source = sequence.pages[-1]
            target = self._take()
            self._readers[source] -= 1
            sequence.pages[-1] = target
            copied = source, target
        for _ in range(fresh):
            sequence.pages.append(self._take())
        sequence.tokens += list(tokens)
        self._publish(sequence)
        slots = []
        for index in range(length, length + len(tokens)):
            page = sequence.pages[index // self.page_tokens]
            slots.append(page * self.page_tokens + index % self.page_tokens)
        return Extension(slots, copied)

    def fits(self, names: Sequence[Hashable], tokens: int) -> bool:
        """Tells whether these sequences can all be extended by so many tokens.

        A page that several of them read counts for each: the last to write would not copy it.
        """
        needed = 0
        for name in names:
            sequence = self._sequences[name]
            needed += self._pages_for(len(sequence.tokens) + tokens) - len(sequence.pages)
            needed += self._must_copy(sequence)
        return needed <= len(self._free)

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """Begins a sequence that shares all pages of another, also the partly filled one."""
        assert child not in self._sequences, f"sequence {child!r} is open already"
        source = self._sequences[parent]
        for page in source.pages:
            self._readers[page] += 1
        self._sequences[child] = _Sequence(
            list(source.pages), list(source.tokens), list(source.digests)
        )

    def release(self, name: Hashable) -> None:
        """Ends a sequence; pages that nobody else reads become free."""
        sequence = self._sequences.pop(name)
        for page in sequence.pages:
            self._readers[page] -= 1
            if self._readers[page] == 0:
                self._give_back(page)

    def table(self, name: Hashable) -> list[int]:
        """Returns the pages of a sequence, in the order of its tokens."""
        return list(self._sequences[name].pages)

    def tokens(self, name: Hashable) -> list[int]:
        """Returns the tokens of a sequence: what a preempted one is computed from again."""
        return list(self._sequences[name].tokens)

    def length(self, name: Hashable) -> int:
        """Returns the number of tokens of a sequence."""
        return len(self._sequences[name].tokens)

    def slots(self, name: Hashable) -> list[int]:
        """Returns the place of every token of a sequence."""
        places = []
        sequence = self._sequences[name]
        for index in range(len(sequence.tokens)):
            page = sequence.pages[index // self.page_tokens]
            places.append(page * self.page_tokens + index % self.page_tokens)
        return places

    def readers(self, page: int) -> int:
        """Returns the number of sequences whose table holds a page."""
        return self._readers[page]

    def grow(self, pages: int) -> None:
        """Adds free pages behind the others."""
        for page in range(self.pages, self.pages + pages):
            heappush(self._free, page)
        self._readers += [0] * pages
        self.pages += pages

    def free_pages(self) -> int:
        """Returns the number of pages that no sequence holds."""
        return len(self._free)

    def sequences(self) -> list[Hashable]:
        """Returns the names of open sequences, oldest first."""
        return list(self._sequences)

    def books(self) -> tuple:
        """Returns everything that the pool records, in a form that can be compared."""
        tables = {name: tuple(sequence.pages) for name, sequence in self._sequences.items()}
        findable = tuple(sorted(self._page_of_digest.items()))
        return tuple(sorted(self._free)), tuple(self._readers), tables, findable

    def waste(self) -> float:
        """Returns the share of taken pages in which no token lies.

        Tokens that several sequences share are counted once, as their page is.
        """
        filled: dict[int, int] = {}
        for sequence in self._sequences.values():
            for index, page in enumerate(sequence.pages):
                here = len(sequence.tokens) - index * self.page_tokens
                filled[page] = max(filled.get(page, 0), min(here, self.page_tokens))
        if not filled:
            return 0.0
        return 1 - sum(filled.values()) / (len(filled) * self.page_tokens)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def _must_copy(self, sequence: _Sequence) -> bool:
        """Tells whether the next token falls into a page that others read too."""
        partly_filled = len(sequence.tokens) % self.page_tokens != 0
        return partly_filled and self._readers[sequence.pages[-1]] > 1

    def _take(self) -> int:
        page = heappop(self._free)
        self._readers[page] = 1
        return page

    def _give_back(self, page: int) -> None:
        digest = self._digest_of_page.pop(page, None)
        if digest is not None:
            del self._page_of_digest[digest]
        heappush(self._free, page)

    def _publish(self, sequence: _Sequence) -> None:
        """Makes the pages that have become full findable."""
        for index in range(len(sequence.digests), len(sequence.tokens) // self.page_tokens):
            before = sequence.digests[-1] if sequence.digests else self._root
            start = index * self.page_tokens
            digest = self._digest(before, sequence.tokens[start : start + self.page_tokens])
            sequence.digests.append(digest)
            # Two sequences may have computed the same tokens side by side: the first page is found.
            if digest not in self._page_of_digest:
                page = sequence.pages[index]
                self._page_of_digest[digest] = page
                self._digest_of_page[page] = digest

    def _digest(self, before: bytes, tokens: Sequence[int]) -> bytes:
        """Names a full page by its tokens and by all that stand before it."""
        content = before + b"".join(token.to_bytes(8, "little", signed=True) for token in tokens)
        return hashlib.blake2b(content, digest_size=16).digest()
