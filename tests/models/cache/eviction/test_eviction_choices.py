"""Each policy holds the tokens that its paper's equations name, on weights made by hand."""

import pytest
import torch

from models.cache.eviction.h2o import HeavyHitterCache
from models.cache.eviction.snapkv import SnapCache, SnapKV
from models.cache.eviction.streaming import StreamingCache
from models.cache.eviction.tova import TovaCache
from models.cache.eviction.window import WindowCache
from models.span import PADDING, Span

ROWS, GROUPS, QUERIES_PER_KEY = 2, 3, 2


def piece(start, tokens, doc=0, rows=ROWS):
    """A payload whose keys say which token and head they are of, and its addresses."""
    pos = torch.arange(start, start + tokens).expand(rows, tokens)
    head = torch.arange(GROUPS) * 1000.0
    key = (pos[..., None] + head)[..., None].expand(rows, tokens, GROUPS, 2)
    return (key, -key), Span.of(pos, torch.full_like(pos, doc))


def held(cache):
    """For each history the positions that it holds, after a look at the payload."""
    (key, value), span = cache.read()
    assert torch.equal(value, -key)
    positions = []
    for row in range(span.shape[0]):
        valid = span.valid()[row]
        positions.append(span.pos[row][valid].tolist())
        if cache.per_head:
            head = row % GROUPS
            assert (key[row, valid, 0, 0] - 1000 * head).tolist() == positions[-1]
    return positions


def random_weights(cache, queries, generator):
    """Weights of the queries over the slots held, [N, H / G, T, S], each row summing to 1."""
    _, span = cache.read()
    shape = span.shape[0], QUERIES_PER_KEY, queries, span.shape[1]
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits.masked_fill(~span.valid()[:, None, None], -torch.inf).softmax(-1)


def observe(cache, weights, span):
    if cache.per_head:
        span = span.map(lambda tensor: tensor.repeat_interleave(GROUPS, 0))
    cache.observe(weights, span)


@pytest.mark.parametrize(("budget", "recent"), [(5, 2), (4, 0), (3, 3)])
def test_h2o_evicts_the_lightest_token_outside_the_recent_ones_at_each_step(budget, recent):
    """Algorithm 1 of the paper, token by token, with sets and dictionaries."""
    generator = torch.Generator().manual_seed(0)
    cache = HeavyHitterCache(budget, recent)
    truth = [{} for _ in range(ROWS * GROUPS)]
    for token in range(14):
        payload, span = piece(token, 1)
        cache.append(payload, span)
        weights = random_weights(cache, 1, generator)
        for history, scores in enumerate(truth):
            scores[token] = 0.0
            for slot, position in enumerate(sorted(scores)):
                scores[position] += weights[history, :, 0, slot].sum().item()
            if len(scores) > budget:
                old = sorted(scores)[: len(scores) - recent]
                del scores[min(old, key=lambda position: scores[position])]
        observe(cache, weights, span)
        assert held(cache) == [sorted(scores) for scores in truth]
    # heads choose for themselves
    assert len({tuple(positions) for positions in held(cache)}) > 1 or recent == budget
    assert cache.counters() == {"evicted": (14 - budget) * ROWS * GROUPS}


def test_h2o_cuts_a_prompt_to_recent_tokens_and_the_heaviest_others():
    generator = torch.Generator().manual_seed(1)
    cache = HeavyHitterCache(6, 2)
    payload, span = piece(0, 12)
    cache.append(payload, span)
    weights = random_weights(cache, 12, generator)
    observe(cache, weights, span)
    for history, positions in enumerate(held(cache)):
        scores = weights[history].sum((0, 1))[:10]
        heavy = scores.topk(4).indices.tolist()
        assert positions == [*sorted(heavy), 10, 11]


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_snapkv_pools_what_the_last_queries_give(pooling):
    generator = torch.Generator().manual_seed(2)
    window, kernel, budget, tokens = 3, 5, 8, 20
    cache = SnapCache(SnapKV(budget, window, kernel, pooling))
    payload, span = piece(0, tokens)
    cache.append(payload, span)
    weights = random_weights(cache, tokens, generator)
    observe(cache, weights, span)
    prefix = tokens - window
    for history, positions in enumerate(held(cache)):
        received = [0.0] * prefix
        for query in range(tokens - window, tokens):
            for token in range(prefix):
                received[token] += weights[history, :, query, token].mean().item()
        pooled = []
        for token in range(prefix):
            # beyond the ends there are zeros, which a mean counts
            near = range(token - kernel // 2, token + kernel // 2 + 1)
            numbers = [received[place] if 0 <= place < prefix else 0.0 for place in near]
            pooled.append(max(numbers) if pooling == "max" else sum(numbers) / kernel)
        chosen = sorted(range(prefix), key=lambda token: -pooled[token])[: budget - window]
        assert positions == sorted(chosen) + list(range(prefix, tokens))


def test_snapkv_holds_every_generated_token():
    generator = torch.Generator().manual_seed(3)
    cache = SnapCache(SnapKV(6, 2, 3))
    for start, tokens in [(0, 12), (12, 1), (13, 1), (14, 1)]:
        payload, span = piece(start, tokens)
        cache.append(payload, span)
        observe(cache, random_weights(cache, tokens, generator), span)
    for positions in held(cache):
        assert len(positions) == 9
        assert positions[-5:] == [10, 11, 12, 13, 14]


def test_tova_evicts_what_the_newest_query_weighs_least_in_the_mean_of_heads():
    generator = torch.Generator().manual_seed(4)
    budget = 4
    cache = TovaCache(budget)
    truth = [[] for _ in range(ROWS)]
    evicted_newest = False
    for token in range(20):
        payload, span = piece(token, 1)
        cache.append(payload, span)
        weights = random_weights(cache, 1, generator)
        for row, positions in enumerate(truth):
            positions.append(token)
            if len(positions) > budget:
                mean = weights[row, :, 0].mean(0).tolist()
                lightest = min(range(len(positions)), key=lambda slot: mean[slot])
                evicted_newest |= positions.pop(lightest) == token
        observe(cache, weights, span)
        assert held(cache) == truth
    # no token is protected
    assert evicted_newest


def test_tova_cuts_a_prompt_by_its_last_query_of_each_row():
    generator = torch.Generator().manual_seed(5)
    cache = TovaCache(3)
    payload, span = piece(0, 9)
    doc = span.doc.clone()
    doc[1, 6:] = PADDING
    span = Span.of(span.pos, doc)
    cache.append(payload, span)
    weights = random_weights(cache, 9, generator)
    cache.observe(weights, span)
    assert held(cache)[0] == sorted(weights[0, :, 8].mean(0).topk(3).indices.tolist())
    assert held(cache)[1] == sorted(weights[1, :, 5, :6].mean(0).topk(3).indices.tolist())


def test_window_holds_the_newest_tokens_and_those_at_hand():
    cache = WindowCache(5)
    for start, tokens in [(0, 9), (9, 1), (10, 2), (12, 7), (19, 1)]:
        payload, span = piece(start, tokens)
        cache.append(payload, span)
        newest = list(range(start + tokens))[-max(5, tokens) :]
        assert held(cache) == [newest] * ROWS
    assert cache.bytes() == 2 * ROWS * 5 * GROUPS * 2 * 4


def test_streaming_holds_sinks_and_the_newest_tokens():
    cache = StreamingCache(6, 2, None)
    for token in range(15):
        cache.append(*piece(token, 1))
    assert held(cache) == [[0, 1, 11, 12, 13, 14]] * ROWS


@pytest.mark.parametrize("make", [lambda: WindowCache(4), lambda: StreamingCache(4, 2, None)])
def test_rows_without_tokens_and_new_documents(make):
    cache = make()
    cache.append(*piece(0, 6))
    payload, span = piece(6, 1)
    doc = span.doc.clone()
    doc[1] = PADDING
    cache.append(payload, Span.of(span.pos, doc))
    first, second = held(cache)
    assert len(first) == 4 and first[-1] == 6
    assert second == [0, 1, 2, 3, 4, 5]
    # another document: the one before is out of sight, and goes when room is needed
    for token in range(5):
        cache.append(*piece(token, 1, doc=1))
    assert (cache.read()[1].doc == 1).all()
    assert held(cache)[0] == ([1, 2, 3, 4] if isinstance(cache, WindowCache) else [0, 1, 3, 4])
