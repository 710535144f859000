"""Arguments of the kernels, in bundles: Triton passes a named tuple field by field.

Letters: B rows, T queries, S keys, H query heads, N distances, C columns of a table.
"""

from typing import Any, NamedTuple


class StridedTensor(NamedTuple):
    """A tensor [B, tokens, heads, width], or without its width, as a pointer and strides."""

    start: Any
    row: Any
    token: Any
    head: Any


class Addresses(NamedTuple):
    """The tokens of one side: their table [B, C, tokens] int32 (programs.py)."""

    table: Any
    columns: Any
    tokens: Any


class Bias(NamedTuple):
    """Numbers of what is done to a product.

    Attributes:
        heads: [H] int32, global numbers.
        numbers: [H] slopes or [H, N] float32; see terms.BiasValues.
        nearest, count: the distance of the first of N numbers, and N.
        scale: of the products.
        cap: bound of the logits.
    """

    heads: Any
    numbers: Any
    nearest: Any
    count: Any
    scale: Any
    cap: Any


class Lists(NamedTuple):
    """Blocks that each block needs: block_lists.Ranges."""

    index: Any
    ranges: Any


class PairTables(NamedTuple):
    """The pairs of one row and one head: tables of one row, the numbers of one head."""

    query_table: Any
    queries: Any
    key_table: Any
    keys: Any
    head: Any
    numbers: Any
    nearest: Any
    count: Any
    scale: Any
    cap: Any


class How(NamedTuple):
    """Constants that a kernel is compiled for.

    Attributes:
        code: instructions of the mask (programs.Program).
        bias: see terms.Terms.
        capped: whether the logits have a bound.
        precision: of the products of float32 numbers, as tl.dot has it.
        width_key, width_value: widths D and E; a field called value would be taken for the tuple.
        wide_key, wide_value: the powers of two that they are filled up to.
        side_q, side_k: queries and keys of a block.
    """

    code: tuple[int, ...]
    bias: int
    capped: bool
    precision: str
    width_key: int
    width_value: int
    wide_key: int
    wide_value: int
    side_q: int
    side_k: int
