"""Attention in Triton for masks that are no bands and scores that bend or shift the logits.

`forward_kernel` attends to more keys and joins them with what (mean, lse) holds, as a ring wants
it. Which key a query sees, and what is added to their product, is worked out inside a block from
the addresses of two tokens (pairs.py): no matrix of pairs is ever stored. Pairs of blocks that
nobody sees are in no list (block_lists.py), and blocks in which the mask hides nothing do not ask
it.

Source: the online softmax of Milakov & Gimelshein 2018 (arXiv:1805.02867) and the blocks of
FlashAttention-2 (Dao 2023, arXiv:2307.08691). Ours differs in that the mask is a program of numbers
that is compiled in. FlexAttention (Dong et al. 2024, arXiv:2412.05496) compiles a function of
Python, and takes no lse from outside.

Sums are float32. Half precision stays half in the products; the weights of a block are rounded to
it. Logits are computed in units of log 2, and lse is stored in nats.

Letters: B rows, T queries, S keys, H query heads, G key heads, D key width, E value width.
"""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# The fields of a constexpr are those of what it holds; a kernel that is called outside raises.

import triton
import triton.language as tl

from models.kernels.triton_attention.pairs import (
    load_rows,
    logits_of_keys,
    pairs_of,
    seen_pairs,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    mean,
    lse,
    query_addresses,
    key_addresses,
    bias,
    lists,
    group,
    HOW: tl.constexpr,
):
    """Attends one block of queries of one head to the keys it needs; joins `mean` and `lse`.

    Grid: (blocks of queries, H, B). q, k, v, mean, lse: StridedTensor; group: H / G.
    """
    # The last queries have most to do under a causal mask, and begin first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    SIDE: tl.constexpr = HOW.side_q
    WIDE: tl.constexpr = HOW.wide_value
    queries = block * SIDE + tl.arange(0, SIDE)
    pairs = pairs_of(query_addresses, key_addresses, bias, row, h, HOW)
    query = load_rows(
        q.start + row * q.row + h * q.head,
        queries,
        q.token,
        pairs.queries,
        HOW.width_key,
        HOW.wide_key,
    )
    g = h // group
    k_start = k.start + row * k.row + g * k.head
    v_start = v.start + row * v.row + g * v.head
    total = tl.zeros([SIDE, WIDE], tl.float32)
    mass = tl.zeros([SIDE], tl.float32)
    highest = tl.full([SIDE], float("-inf"), tl.float32)
    index = lists.index + (row * tl.num_programs(0) + block) * 4
    for masked in tl.static_range(2):
        for part in range(tl.load(index + 2 * masked), tl.load(index + 2 * masked + 1)):
            span = lists.ranges + 2 * part
            for j in range(tl.load(span), tl.load(span + 1)):
                total, mass, highest = _attend(
                    query, k_start, k.token, v_start, v.token, pairs, queries, j, total, mass,
                    highest, HOW, masked,
                )  # fmt: skip
    mean_start = mean.start + row * mean.row + h * mean.head
    lse_start = lse.start + row * lse.row + h * lse.head
    _join(
        mean_start, mean.token, lse_start, lse.token, queries, pairs.queries, total, mass, highest,
        HOW,
    )  # fmt: skip


@triton.jit
def _attend(
    query,
    k,
    k_step,
    v,
    v_step,
    pairs,
    queries,
    block,
    total,
    mass,
    highest,
    HOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attends to a block of keys: (total [queries, wide_value], mass, highest), rescaled."""
    keys, _, logits, _ = logits_of_keys(query, k, k_step, pairs, queries, block, HOW)
    if MASKED:
        seen = seen_pairs(pairs, queries, keys, HOW.code, False)
        logits = tl.where(seen, logits, float("-inf"))
    top = tl.maximum(highest, tl.max(logits, 1))
    # Where no key was seen yet, minus infinity less itself would be NaN.
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(logits - base[:, None])
    kept = tl.exp2(highest - base)
    mass = mass * kept + tl.sum(weight, 1)
    value = load_rows(v, keys, v_step, pairs.keys, HOW.width_value, HOW.wide_value)
    total = total * kept[:, None]
    total = tl.dot(weight.to(value.dtype), value, total, input_precision=HOW.precision)
    return total, mass, top


@triton.jit
def _join(
    mean,
    mean_step,
    lse,
    lse_step,
    queries,
    size,
    total,
    mass,
    highest,
    HOW: tl.constexpr,
):
    """Joins what was computed with what is stored; an lse of minus infinity weighs nothing."""
    inside = queries < size
    place = queries.to(tl.int64)
    before = tl.load(lse + place * lse_step, mask=inside, other=float("-inf"))
    full = tl.where(mass > 0, mass, 1.0)
    here = tl.where(mass == 0, float("-inf"), (highest + tl.log2(full)) * LN2)
    top = tl.maximum(before, here)
    base = tl.where(top == float("-inf"), 0.0, top)
    old = tl.exp(before - base)
    new = tl.exp(here - base)
    both = tl.where(top == float("-inf"), 1.0, old + new)
    joined = tl.where(top == float("-inf"), top, base + tl.log(both))
    tl.store(lse + place * lse_step, joined, mask=inside)
    WIDE: tl.constexpr = HOW.wide_value
    wide = tl.arange(0, WIDE)
    spot = mean + place[:, None] * mean_step + wide[None, :]
    stored = inside[:, None] & (wide[None, :] < HOW.width_value)
    earlier = tl.load(spot, mask=stored, other=0.0)
    share = new / (both * full)
    tl.store(spot, earlier * (old / both)[:, None] + total * share[:, None], mask=stored)
