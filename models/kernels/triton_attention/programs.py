"""Translates a mask into a program of whole numbers, which the kernels carry out for each pair.

A mask is a tree over few kinds of questions: whether two numbers of two tokens are equal, whether
their difference lies between two bounds, whether a token has a property. The numbers of a token
(its position, its document, its chunk, the blocks that it has drawn) are columns of a table, worked
out once for each token by the code of the mask itself. So visibility takes memory as long as the
sequence, and none for pairs.

A mask that is not in RULES has no program, and whatever served it serves it.

Letters: B rows, T tokens, C columns, P patterns.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.masks.algebra import And, Mask, Not, Or
from models.masks.basic import Causal, FirstTokens, SameChunk, SameDocument, SlidingWindow
from models.masks.roles import GlobalKey, GlobalQuery, PrefixTokens, RoleKey, RoleQuery
from models.masks.segments import STALE, PreviousTokens, SegmentRecurrence
from models.masks.sparse import DilatedWindow, NeighborBlocks, RandomBlocks
from models.span import GLOBAL, PREFIX, READ, Span

# What the first number of an instruction asks; the numbers after it:
AND = 0  # addresses of two instructions
OR = 1  # addresses of two instructions
NOT = 2  # address of an instruction
EQUAL = 3  # column of queries, column of keys
BAND = 4  # column of queries, column of keys, low <= difference <= high
QUERY = 5  # bit of the properties of a query
KEY = 6  # bit of the properties of a key
DILATED = 7  # window, number of gaps, the gap of each head
QUERY_DREW = 8  # first column of queries, draws, whether heads differ, column of keys
KEY_DREW = 9  # first column of keys, draws, whether heads differ, column of queries

PROPERTIES, POSITION = 0, 1  # the columns that every table begins with
MOST_BITS = 31
MOST_COLUMNS = 256
ENDLESS = 2**31 - 1  # a bound that hides nothing; no distance is as large


class TokenColumn(NamedTuple):
    """A number of every token, or P x count of them where a mask draws.

    Attributes:
        name: a key of COLUMNS.
        size: tokens of a chunk.
        drawn_by: the mask that draws.
    """

    name: str
    size: int = 0
    drawn_by: RandomBlocks | None = None


class Property(NamedTuple):
    """Something that is true or false of a token; `name` is a key of PROPERTY_TESTS."""

    name: str
    value: int = 0


class Program(NamedTuple):
    """A mask for the kernels; the first instruction of the code is that of the whole mask.

    Attributes:
        code: instructions end to end.
        query_columns, key_columns: of the tables that instructions refer to, after the first two.
        query_properties, key_properties: of the bits; bit 0 tells whether the token is valid.
    """

    code: tuple[int, ...]
    query_columns: tuple[TokenColumn, ...]
    key_columns: tuple[TokenColumn, ...]
    query_properties: tuple[Property, ...]
    key_properties: tuple[Property, ...]


COLUMNS: dict[str, Callable[[Span, TokenColumn], Tensor]] = {
    "document": lambda span, column: span.doc,
    "chunk": lambda span, column: span.pos // column.size,
    "chunk start": lambda span, column: span.pos // column.size * column.size,
}
PROPERTY_TESTS: dict[str, Callable[[Span, int], Tensor]] = {
    "valid": lambda span, value: span.valid(),
    "role": lambda span, value: span.role == value,
    "below": lambda span, value: span.pos < value,
    "multiple": lambda span, value: span.pos % value == 0,
}
VALID = Property("valid")


def token_table(program: Program, span: Span, *, keys: bool) -> Tensor:
    """Returns the table [B, C, T] int32 of queries or of keys; made once for all layers."""
    columns = program.key_columns if keys else program.query_columns
    properties = program.key_properties if keys else program.query_properties
    key = ("columns of pairs", columns, properties)
    return span.cache.get(key, lambda: _build_table(span, columns, properties))


def _build_table(
    span: Span, columns: tuple[TokenColumn, ...], properties: tuple[Property, ...]
) -> Tensor:
    bits = torch.zeros_like(span.pos)
    for bit, each in enumerate(properties):
        bits |= PROPERTY_TESTS[each.name](span, each.value).long() << bit
    table = [bits[:, None], span.pos[:, None]]
    for column in columns:
        table.append(_column_values(span, column))
    # Documents are compared for equality alone: their numbers may lose what is above 32 bits.
    return torch.cat(table, 1).to(torch.int32).contiguous()


def _column_values(span: Span, column: TokenColumn) -> Tensor:
    """[B, 1 or P x count, T] int64."""
    mask = column.drawn_by
    if mask is None:
        return COLUMNS[column.name](span, column)[:, None]
    patterns = torch.arange(mask.patterns, device=span.pos.device)
    drawn = mask.drawn(span.pos // mask.block, patterns)
    return drawn.permute(1, 0, 3, 2).flatten(1, 2)


class _Translator:
    """Writes the program of one mask."""

    def __init__(self):
        self.code: list[int] = []
        # for queries and for keys
        self.columns: tuple[list[TokenColumn], list[TokenColumn]] = ([], [])
        self.properties: tuple[list[Property], list[Property]] = ([VALID], [VALID])

    def add(self, mask: Mask) -> int:
        """Writes a mask and returns its address.

        Raises:
            LookupError: a mask without a rule.
        """
        return RULES[type(mask)](self, mask)

    def write(self, *numbers: int) -> int:
        """Writes an instruction and returns its address."""
        address = len(self.code)
        self.code += numbers
        return address

    def join(self, operation: int, *masks: Mask | Callable[[], int]) -> int:
        """Writes an instruction about others before them."""
        address = self.write(operation, *[0] * len(masks))
        for place, mask in enumerate(masks, address + 1):
            self.code[place] = self.add(mask) if isinstance(mask, Mask) else mask()
        return address

    def column(self, side: int, column: TokenColumn) -> int:
        """Returns the first column of the table of queries (0) or keys (1) that holds it."""
        columns = self.columns[side]
        if column not in columns:
            columns.append(column)
        before = columns[: columns.index(column)]
        return POSITION + 1 + sum(map(_columns_of, before))

    def equal(self, column: TokenColumn) -> int:
        """Asks whether queries and keys have the same number."""
        return self.write(EQUAL, self.column(0, column), self.column(1, column))

    def band(self, query: int, key: int, low: int, high: int) -> int:
        """Asks whether the difference of two columns lies between two bounds."""
        return self.write(BAND, query, key, max(low, -ENDLESS), min(high, ENDLESS))

    def property(self, side: int, name: str, value: int = 0) -> int:
        """Asks for a property of queries (0) or of keys (1)."""
        properties = self.properties[side]
        asked = Property(name, value)
        if asked not in properties:
            properties.append(asked)
        return self.write((QUERY, KEY)[side], properties.index(asked))

    def globals(self, side: int, mask: GlobalKey | GlobalQuery) -> int:
        """Asks whether queries or keys are global."""
        asked = [lambda: self.property(side, "role", GLOBAL)]
        if mask.first:
            asked.append(lambda: self.property(side, "below", mask.first))
        if mask.every:
            asked.append(lambda: self.property(side, "multiple", mask.every))
        return self.either(*asked)

    def either(self, *asked: Callable[[], int]) -> int:
        """Joins questions of which one must hold."""
        if len(asked) == 1:
            return asked[0]()
        return self.join(OR, asked[0], lambda: self.either(*asked[1:]))

    def previous(self, size: int, low: int, length: int) -> int:
        """Asks for keys from `low` to `length` tokens before the start of the query's segment."""
        start = self.column(0, TokenColumn("chunk start", size))
        return self.band(start, POSITION, low, length)

    def segments(self, mask: SegmentRecurrence) -> int:
        """Keys by role: those of earlier rows, those as later segments see them, live ones."""

        def read() -> int:
            return self.join(
                AND,
                lambda: self.property(1, "role", READ),
                lambda: self.previous(mask.size, -ENDLESS, mask.length),
            )

        def stale() -> int:
            return self.join(
                AND,
                lambda: self.property(1, "role", STALE),
                lambda: self.previous(mask.size, 1, mask.length),
            )

        def live() -> int:
            others = ~(RoleKey(READ) | RoleKey(STALE))
            return self.join(AND, others, SameChunk(mask.size))

        return self.either(read, stale, live)

    def drawn(self, mask: RandomBlocks) -> int:
        """Asks whether a query has drawn the block of a key, or the other way too."""
        if not mask.count:
            return self.add(~Mask())
        links = TokenColumn("drawn", drawn_by=mask)
        block = TokenColumn("chunk", mask.block)
        rest = mask.count, int(mask.patterns > 1)

        def forth() -> int:
            return self.write(QUERY_DREW, self.column(0, links), *rest, self.column(1, block))

        def back() -> int:
            return self.write(KEY_DREW, self.column(1, links), *rest, self.column(0, block))

        return self.either(forth, back) if mask.both else forth()


def _columns_of(column: TokenColumn) -> int:
    mask = column.drawn_by
    return 1 if mask is None else mask.patterns * mask.count


# The exact class of a mask: one derived from it may show other keys.
RULES: dict[type[Mask], Callable[[_Translator, Any], int]] = {
    Mask: lambda to, mask: to.property(1, "valid"),
    And: lambda to, mask: to.join(AND, mask.a, mask.b),
    Or: lambda to, mask: to.join(OR, mask.a, mask.b),
    Not: lambda to, mask: to.join(NOT, mask.a),
    Causal: lambda to, mask: to.band(POSITION, POSITION, 0, ENDLESS),
    SameDocument: lambda to, mask: to.equal(TokenColumn("document")),
    SlidingWindow: lambda to, mask: to.band(POSITION, POSITION, -ENDLESS, mask.window - 1),
    FirstTokens: lambda to, mask: to.property(1, "below", mask.count),
    SameChunk: lambda to, mask: to.equal(TokenColumn("chunk", mask.size)),
    PrefixTokens: lambda to, mask: to.property(1, "role", PREFIX),
    RoleKey: lambda to, mask: to.property(1, "role", mask.role),
    RoleQuery: lambda to, mask: to.property(0, "role", mask.role),
    GlobalKey: lambda to, mask: to.globals(1, mask),
    GlobalQuery: lambda to, mask: to.globals(0, mask),
    PreviousTokens: lambda to, mask: to.previous(mask.size, 1, mask.length),
    SegmentRecurrence: lambda to, mask: to.segments(mask),
    DilatedWindow: lambda to, mask: to.write(
        DILATED, mask.window, len(mask.dilation), *mask.dilation
    ),
    NeighborBlocks: lambda to, mask: to.band(
        to.column(0, TokenColumn("chunk", mask.block)),
        to.column(1, TokenColumn("chunk", mask.block)),
        -mask.window,
        mask.window,
    ),
    RandomBlocks: lambda to, mask: to.drawn(mask),
}


@lru_cache(maxsize=256)
def translate(mask: Mask) -> Program | None:
    """Returns the program of a mask; None where a part of it has no rule, or it is too large."""
    translator = _Translator()
    try:
        translator.add(mask)
    except LookupError:
        return None
    columns = translator.columns
    properties = translator.properties
    if max(map(len, properties)) > MOST_BITS:
        return None
    if max(sum(map(_columns_of, side)) for side in columns) > MOST_COLUMNS:
        return None
    sides = tuple(columns[0]), tuple(columns[1]), tuple(properties[0]), tuple(properties[1])
    return Program(tuple(translator.code), *sides)
