"""Triton: what a block of pairs needs of addresses, namely who sees whom and what is added.

Letters: T queries and S keys of a row; N distances. FLIP turns blocks from [queries, keys] to
[keys, queries].
"""

# pyright: reportAttributeAccessIssue=false
# The fields of a constexpr are those of what it holds.

import triton
import triton.language as tl

from models.kernels.triton_attention import programs, terms
from models.kernels.triton_attention.arguments import PairTables

AND = tl.constexpr(programs.AND)
OR = tl.constexpr(programs.OR)
NOT = tl.constexpr(programs.NOT)
EQUAL = tl.constexpr(programs.EQUAL)
BAND = tl.constexpr(programs.BAND)
QUERY = tl.constexpr(programs.QUERY)
KEY = tl.constexpr(programs.KEY)
DILATED = tl.constexpr(programs.DILATED)
QUERY_DREW = tl.constexpr(programs.QUERY_DREW)
PROPERTIES = tl.constexpr(programs.PROPERTIES)
POSITION = tl.constexpr(programs.POSITION)
ENDLESS = tl.constexpr(programs.ENDLESS)
NO_BIAS = tl.constexpr(terms.NO_BIAS)
SLOPES = tl.constexpr(terms.SLOPES)
DISTANCES = tl.constexpr(terms.DISTANCES)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(start, tokens, step, size, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Loads [tokens, WIDE] of rows of WIDTH numbers; 0 from token `size` on and beyond WIDTH."""
    wide = tl.arange(0, WIDE)
    mask = tokens[:, None] < size
    if WIDTH != WIDE:
        mask = mask & (wide[None, :] < WIDTH)
    return tl.load(start + tokens.to(tl.int64)[:, None] * step + wide[None, :], mask, other=0.0)


@triton.jit
def add_rows(start, tokens, step, size, values, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Adds [tokens, WIDE] to rows of WIDTH numbers."""
    wide = tl.arange(0, WIDE)
    place = start + tokens.to(tl.int64)[:, None] * step + wide[None, :]
    mask = (tokens[:, None] < size) & (wide[None, :] < WIDTH)
    tl.store(place, tl.load(place, mask, other=0.0) + values, mask)


@triton.jit
def pairs_of(queries, keys, bias, row, h, HOW: tl.constexpr):
    """The pairs of one row and of head h of those at hand."""
    numbers = bias.numbers
    if HOW.bias == SLOPES:
        numbers += h
    elif HOW.bias == DISTANCES:
        numbers += h * bias.count
    return PairTables(
        queries.table + row * queries.columns * queries.tokens,
        queries.tokens,
        keys.table + row * keys.columns * keys.tokens,
        keys.tokens,
        tl.load(bias.heads + h),
        numbers,
        bias.nearest,
        bias.count,
        bias.scale,
        bias.cap,
    )


@triton.jit
def _of_queries(pairs, column, tokens, FLIP: tl.constexpr):
    """A column of queries, along their side of a block."""
    place = pairs.query_table + column * pairs.queries + tokens
    values = tl.load(place, mask=tokens < pairs.queries, other=0)
    if FLIP:
        values = values[None, :]
    else:
        values = values[:, None]
    return values


@triton.jit
def _of_keys(pairs, column, tokens, FLIP: tl.constexpr):
    """A column of keys, along their side of a block."""
    place = pairs.key_table + column * pairs.keys + tokens
    values = tl.load(place, mask=tokens < pairs.keys, other=0)
    if FLIP:
        values = values[:, None]
    else:
        values = values[None, :]
    return values


@triton.jit
def _shown(pairs, queries, keys, CODE: tl.constexpr, AT: tl.constexpr, FLIP: tl.constexpr):
    """Runs the instruction at AT on every pair; broadcasts to a block."""
    if CODE[AT] == AND:
        shown = _shown(pairs, queries, keys, CODE, CODE[AT + 1], FLIP)
        shown = shown & _shown(pairs, queries, keys, CODE, CODE[AT + 2], FLIP)
    elif CODE[AT] == OR:
        shown = _shown(pairs, queries, keys, CODE, CODE[AT + 1], FLIP)
        shown = shown | _shown(pairs, queries, keys, CODE, CODE[AT + 2], FLIP)
    elif CODE[AT] == NOT:
        shown = _shown(pairs, queries, keys, CODE, CODE[AT + 1], FLIP) == 0
    elif CODE[AT] == EQUAL:
        shown = _of_queries(pairs, CODE[AT + 1], queries, FLIP) == _of_keys(
            pairs, CODE[AT + 2], keys, FLIP
        )
    elif CODE[AT] == BAND:
        shown = _within(pairs, queries, keys, CODE, AT, FLIP)
    elif CODE[AT] == QUERY:
        shown = ((_of_queries(pairs, PROPERTIES, queries, FLIP) >> CODE[AT + 1]) & 1) != 0
    elif CODE[AT] == KEY:
        shown = ((_of_keys(pairs, PROPERTIES, keys, FLIP) >> CODE[AT + 1]) & 1) != 0
    elif CODE[AT] == DILATED:
        shown = _dilated(pairs, queries, keys, CODE, AT, FLIP)
    else:
        shown = _drawn(pairs, queries, keys, CODE, AT, FLIP)
    return shown


@triton.jit
def _within(pairs, queries, keys, CODE: tl.constexpr, AT: tl.constexpr, FLIP: tl.constexpr):
    """Tells whether the difference of two columns lies between two bounds."""
    apart = _of_queries(pairs, CODE[AT + 1], queries, FLIP)
    apart = apart - _of_keys(pairs, CODE[AT + 2], keys, FLIP)
    if CODE[AT + 3] == -ENDLESS:
        shown = apart <= CODE[AT + 4]
    elif CODE[AT + 4] == ENDLESS:
        shown = apart >= CODE[AT + 3]
    else:
        shown = (apart >= CODE[AT + 3]) & (apart <= CODE[AT + 4])
    return shown


@triton.jit
def _dilated(pairs, queries, keys, CODE: tl.constexpr, AT: tl.constexpr, FLIP: tl.constexpr):
    """Tells whether the distance is a multiple of the head's gap, within so many of them."""
    apart = tl.abs(_distance(pairs, queries, keys, FLIP))
    GAPS: tl.constexpr = CODE[AT + 2]
    gap = pairs.head * 0 + CODE[AT + 3]
    for other in tl.static_range(1, GAPS):
        gap = tl.where(pairs.head == other, CODE[AT + 3 + other], gap)
    return (apart < CODE[AT + 1] * gap) & (apart % gap == 0)


@triton.jit
def _drawn(pairs, queries, keys, CODE: tl.constexpr, AT: tl.constexpr, FLIP: tl.constexpr):
    """Tells whether one side has drawn the block of the other."""
    DRAWS: tl.constexpr = CODE[AT + 2]
    first = CODE[AT + 1] + pairs.head * (CODE[AT + 3] * DRAWS)
    if CODE[AT] == QUERY_DREW:
        block = _of_keys(pairs, CODE[AT + 4], keys, FLIP)
        shown = _of_queries(pairs, first, queries, FLIP) == block
        for draw in tl.static_range(1, DRAWS):
            shown = shown | (_of_queries(pairs, first + draw, queries, FLIP) == block)
    else:
        block = _of_queries(pairs, CODE[AT + 4], queries, FLIP)
        shown = _of_keys(pairs, first, keys, FLIP) == block
        for draw in tl.static_range(1, DRAWS):
            shown = shown | (_of_keys(pairs, first + draw, keys, FLIP) == block)
    return shown


@triton.jit
def seen_pairs(pairs, queries, keys, CODE: tl.constexpr, FLIP: tl.constexpr):
    """Tells which query of a block sees which key."""
    shown = _shown(pairs, queries, keys, CODE, 0, FLIP)
    # Bit 0 says that a token is valid; what lies beyond the tokens has no bit.
    both = _of_queries(pairs, PROPERTIES, queries, FLIP) & _of_keys(pairs, PROPERTIES, keys, FLIP)
    return shown & ((both & 1) != 0)


@triton.jit
def _distance(pairs, queries, keys, FLIP: tl.constexpr):
    return _of_queries(pairs, POSITION, queries, FLIP) - _of_keys(pairs, POSITION, keys, FLIP)


@triton.jit
def number_index(pairs, queries, keys, FLIP: tl.constexpr):
    """The place of each pair's distance among the N numbers."""
    apart = _distance(pairs, queries, keys, FLIP) - pairs.nearest
    return tl.minimum(tl.maximum(apart, 0), pairs.count - 1)


@triton.jit
def logits_of(products, pairs, queries, keys, HOW: tl.constexpr, FLIP: tl.constexpr):
    """(logits in units of log 2, what their gradient is multiplied with)."""
    slope = 1.0
    if HOW.bias == NO_BIAS and not HOW.capped:
        logits = products * (pairs.scale * LOG2E)
    else:
        logits = products * pairs.scale
        if HOW.bias == SLOPES:
            apart = tl.abs(_distance(pairs, queries, keys, FLIP))
            logits -= tl.load(pairs.numbers) * apart.to(tl.float32)
        elif HOW.bias == DISTANCES:
            logits += tl.load(pairs.numbers + number_index(pairs, queries, keys, FLIP))
        if HOW.capped:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), which holds where exp overflows
            bent = 1 - 2 / (tl.exp2(logits * (2 * LOG2E / pairs.cap)) + 1)
            slope = 1 - bent * bent
            logits = bent * pairs.cap
        logits = logits * LOG2E
    return logits, slope


@triton.jit
def logits_of_keys(query, k, k_step, pairs, queries, block, HOW: tl.constexpr):
    """Loads a block of keys, [queries, keys]: (their numbers, keys, then as `logits_of`)."""
    SIDE: tl.constexpr = HOW.side_k
    keys = block * SIDE + tl.arange(0, SIDE)
    key = load_rows(k, keys, k_step, pairs.keys, HOW.width_key, HOW.wide_key)
    products = tl.dot(query, tl.trans(key), input_precision=HOW.precision)
    logits, slope = logits_of(products, pairs, queries, keys, HOW, False)
    return keys, key, logits, slope
