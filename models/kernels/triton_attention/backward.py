"""Gradients of the attention of forward.py in Triton: of queries, of keys and values.

Both kernels take the gradient of the mean, the lse over ALL keys and delta from outside, compute
the weights of a block again, and add to float32 sums that one program alone writes, so their order
is fixed. Only the gradient of a learned bias by distances is added by atomic additions.

Letters: B rows, T queries, S keys, H query heads, G key heads, D key width, E value width.
"""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# The fields of a constexpr are those of what it holds; a kernel that is called outside raises.

import triton
import triton.language as tl

from models.kernels.triton_attention.pairs import (
    DISTANCES,
    LOG2E,
    add_rows,
    load_rows,
    logits_of,
    logits_of_keys,
    number_index,
    pairs_of,
    seen_pairs,
)


@triton.jit
def query_gradient_kernel(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    d_q,
    d_numbers,
    query_addresses,
    key_addresses,
    bias,
    lists,
    group,
    HOW: tl.constexpr,
):
    """Adds to the gradient of one block of queries of one head, and to that of the distances.

    Grid: (blocks of queries, H, B). d_numbers: [H, N] float32; the rest: StridedTensor.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    SIDE: tl.constexpr = HOW.side_q
    queries = block * SIDE + tl.arange(0, SIDE)
    pairs = pairs_of(query_addresses, key_addresses, bias, row, h, HOW)
    size = pairs.queries
    q_start = q.start + row * q.row + h * q.head
    query = load_rows(q_start, queries, q.token, size, HOW.width_key, HOW.wide_key)
    d_start = d_out.start + row * d_out.row + h * d_out.head
    d_mean = load_rows(d_start, queries, d_out.token, size, HOW.width_value, HOW.wide_value)
    masses = _masses(lse, row, h, queries, size)
    deltas = _deltas(delta, row, h, queries, size)
    g = h // group
    k_start = k.start + row * k.row + g * k.head
    v_start = v.start + row * v.row + g * v.head
    d_numbers += h * bias.count
    WIDE_KEY: tl.constexpr = HOW.wide_key
    total = tl.zeros([SIDE, WIDE_KEY], tl.float32)
    index = lists.index + (row * tl.num_programs(0) + block) * 4
    for masked in tl.static_range(2):
        for part in range(tl.load(index + 2 * masked), tl.load(index + 2 * masked + 1)):
            span = lists.ranges + 2 * part
            for j in range(tl.load(span), tl.load(span + 1)):
                total = _through_keys(
                    query, d_mean, masses, deltas, k_start, k.token, v_start, v.token, d_numbers,
                    pairs, queries, j, total, HOW, masked,
                )  # fmt: skip
    sums = d_q.start + row * d_q.row + h * d_q.head
    add_rows(sums, queries, d_q.token, size, total * bias.scale, HOW.width_key, HOW.wide_key)


@triton.jit
def _masses(lse, row, h, queries, size):
    """lse of queries in units of log 2; beyond them one that gives every key weight 0.

    A query that saw no key has minus infinity; it is 0 here, and the mask hides its keys.
    """
    place = lse.start + row * lse.row + h * lse.head + queries.to(tl.int64) * lse.token
    masses = tl.load(place, mask=queries < size, other=float("inf"))
    return tl.where(masses == float("-inf"), 0.0, masses) * LOG2E


@triton.jit
def _deltas(delta, row, h, queries, size):
    place = delta.start + row * delta.row + h * delta.head + queries.to(tl.int64) * delta.token
    return tl.load(place, mask=queries < size, other=0.0)


@triton.jit
def _through_keys(
    query,
    d_mean,
    masses,
    deltas,
    k,
    k_step,
    v,
    v_step,
    d_numbers,
    pairs,
    queries,
    block,
    total,
    HOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what comes through a block of keys to [queries, wide_key], without scale."""
    keys, key, logits, slope = logits_of_keys(query, k, k_step, pairs, queries, block, HOW)
    weight = tl.exp2(logits - masses[:, None])
    if MASKED:
        seen = seen_pairs(pairs, queries, keys, HOW.code, False)
        weight = tl.where(seen, weight, 0.0)
    value = load_rows(v, keys, v_step, pairs.keys, HOW.width_value, HOW.wide_value)
    d_weight = tl.dot(d_mean, tl.trans(value), input_precision=HOW.precision)
    d_logits = weight * (d_weight - deltas[:, None])
    if HOW.capped:
        d_logits *= slope
    if HOW.bias == DISTANCES:
        _add_numbers(d_numbers, d_logits, pairs, queries, keys)
    return tl.dot(d_logits.to(key.dtype), key, total, input_precision=HOW.precision)


@triton.jit
def _add_numbers(d_numbers, d_logits, pairs, queries, keys):
    """Adds a block of gradients to those of its distances.

    Most pairs share the last distance or the first: they are summed before they are added.
    """
    index = number_index(pairs, queries, keys, False)
    end = pairs.count - 1
    furthest = tl.where(index == end, d_logits, 0.0)
    nearest = tl.where(index == 0, d_logits, 0.0)
    tl.atomic_add(d_numbers + end, tl.sum(tl.sum(furthest, 1), 0), sem="relaxed")
    tl.atomic_add(d_numbers, tl.sum(tl.sum(nearest, 1), 0), sem="relaxed")
    between = (index > 0) & (index < end) & (d_logits != 0)
    if tl.max(tl.max(between.to(tl.int32), 1), 0) > 0:
        tl.atomic_add(d_numbers + index, d_logits, mask=between, sem="relaxed")


@triton.jit
def key_gradient_kernel(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    d_k,
    d_v,
    query_addresses,
    key_addresses,
    bias,
    lists,
    group,
    HOW: tl.constexpr,
):
    """Adds to the gradients of one block of keys of one key head, by all heads that read it.

    Grid: (blocks of keys, G, B).
    """
    block = tl.program_id(0)
    g = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    SIDE: tl.constexpr = HOW.side_k
    keys = block * SIDE + tl.arange(0, SIDE)
    size = key_addresses.tokens
    k_start = k.start + row * k.row + g * k.head
    key = load_rows(k_start, keys, k.token, size, HOW.width_key, HOW.wide_key)
    v_start = v.start + row * v.row + g * v.head
    value = load_rows(v_start, keys, v.token, size, HOW.width_value, HOW.wide_value)
    WIDE_KEY: tl.constexpr = HOW.wide_key
    WIDE_VALUE: tl.constexpr = HOW.wide_value
    d_key = tl.zeros([SIDE, WIDE_KEY], tl.float32)
    d_value = tl.zeros([SIDE, WIDE_VALUE], tl.float32)
    index = lists.index + (row * tl.num_programs(0) + block) * 4
    for h in range(g * group, g * group + group):
        pairs = pairs_of(query_addresses, key_addresses, bias, row, h, HOW)
        for masked in tl.static_range(2):
            for part in range(tl.load(index + 2 * masked), tl.load(index + 2 * masked + 1)):
                span = lists.ranges + 2 * part
                for i in range(tl.load(span), tl.load(span + 1)):
                    d_key, d_value = _through_queries(
                        key, value, q, d_out, lse, delta, pairs, row, h, i, keys, d_key, d_value,
                        HOW, masked,
                    )  # fmt: skip
    sums = d_k.start + row * d_k.row + g * d_k.head
    add_rows(sums, keys, d_k.token, size, d_key * bias.scale, HOW.width_key, HOW.wide_key)
    sums = d_v.start + row * d_v.row + g * d_v.head
    add_rows(sums, keys, d_v.token, size, d_value, HOW.width_value, HOW.wide_value)


@triton.jit
def _through_queries(
    key,
    value,
    q,
    d_out,
    lse,
    delta,
    pairs,
    row,
    h,
    block,
    keys,
    d_key,
    d_value,
    HOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what comes through a block of queries to d_key (without scale) and d_value."""
    SIDE: tl.constexpr = HOW.side_q
    queries = block * SIDE + tl.arange(0, SIDE)
    size = pairs.queries
    q_start = q.start + row * q.row + h * q.head
    query = load_rows(q_start, queries, q.token, size, HOW.width_key, HOW.wide_key)
    products = tl.dot(key, tl.trans(query), input_precision=HOW.precision)
    logits, slope = logits_of(products, pairs, queries, keys, HOW, True)
    weight = tl.exp2(logits - _masses(lse, row, h, queries, size)[None, :])
    if MASKED:
        seen = seen_pairs(pairs, queries, keys, HOW.code, True)
        weight = tl.where(seen, weight, 0.0)
    d_start = d_out.start + row * d_out.row + h * d_out.head
    d_mean = load_rows(d_start, queries, d_out.token, size, HOW.width_value, HOW.wide_value)
    d_value = tl.dot(weight.to(d_mean.dtype), d_mean, d_value, input_precision=HOW.precision)
    d_weight = tl.dot(value, tl.trans(d_mean), input_precision=HOW.precision)
    d_logits = weight * (d_weight - _deltas(delta, row, h, queries, size)[None, :])
    if HOW.capped:
        d_logits *= slope
    d_key = tl.dot(d_logits.to(query.dtype), query, d_key, input_precision=HOW.precision)
    return d_key, d_value
