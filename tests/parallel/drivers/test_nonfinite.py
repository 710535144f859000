"""What a query may not see does not reach it: rubbish in other documents, in padding and beyond the
window stays there."""

import pytest
import torch

from models.attention.full import CAUSAL
from models.masks.basic import SlidingWindow
from models.primitives.softmax import Softmax
from models.scores import Score
from parallel.collectives import Communicator
from parallel.context_parallel import METHODS
from parallel.layout import POLICIES, layouts
from parallel.sharding import shard_span
from tests.support.parity import GRID_HEADS, grid, packed, relative
from tests.support.pool import ranks

NEAR = CAUSAL & SlidingWindow(5)


class Doubled(Score):
    """A score that only the general tile knows."""

    plain = False

    def logits(self, query, payload, params, span, kv_span, heads):
        return 2 * super().logits(query, payload, params, span, kv_span, heads)


def driven(env, method, mask, score, span, policy="zigzag"):
    """The driver of an attention and this rank's addresses."""
    communicator, side = Communicator(env.group), GRID_HEADS[env.size] if method == "usp" else 1
    if method == "usp":
        communicator.add_grid(*grid(env, side))
        communicator.heads = side
    return METHODS[method](Softmax(mask, score), communicator), shard_span(
        span, layouts(policy, span, env.size, heads=side), env.rank
    )


def poisoned(env, method, mask, score, spoilt, number):
    """Output and gradients of the tokens that are not spoilt and see nothing spoilt; clean, and
    with `number` put in."""
    span = packed()
    torch.manual_seed(4)
    leaves = [torch.randn(*span.shape, heads, 4, dtype=torch.float64) for heads in (4, 2, 2)]
    weight = torch.randn(*span.shape, 4, 4, dtype=torch.float64)
    look = mask.dense(span, span)[:, 0] & span.valid()[:, :, None] & span.valid()[:, None, :]
    saw = (look & spoilt[:, None, :]).any(
        2
    ) | spoilt  # queries that a spoilt key may reach, and the spoilt themselves
    held = (look & saw[:, :, None]).any(
        1
    ) | saw  # and keys that such a query touches in its backward pass
    results = []
    for fill in (None, number):
        driver, here = driven(env, method, mask, score, span)
        shard = here.sharding.shard
        mine = [
            shard(x if fill is None else x.masked_fill(spoilt[..., None, None], fill), 0)
            for x in leaves
        ]
        q, k, v = (x.clone().requires_grad_() for x in mine)
        out = driver((q,), (k, v), span=here)
        (out * shard(weight * ~saw[..., None, None], 0)).sum().backward()
        well, whole = (shard((~bad).long(), 0).bool()[..., None, None] for bad in (saw, held))
        results.append([out.detach().where(well, 0), *(x.grad.where(whole, 0) for x in (q, k, v))])
    assert all(x.isfinite().all() for x in results[1])
    return max(relative(dirty, clean) for clean, dirty in zip(*results))


def spoilt_tokens(what):
    span = packed()
    return {
        "another document": span.doc == 2,
        "padding": ~span.valid(),
        "beyond the window": (span.doc == 2) & (span.pos < 9),
    }[what]


@pytest.mark.parametrize("what", ["another document", "padding", "beyond the window"])
@pytest.mark.parametrize("method", METHODS)
def test_rubbish_stays_where_it_is(method, what):
    mask = NEAR if what == "beyond the window" else CAUSAL
    for size, number in ((3, torch.nan), (4, torch.inf)):
        assert max(ranks(size, poisoned, method, mask, None, spoilt_tokens(what), number)) < 1e-12


def test_nor_does_it_spread_in_the_general_tile():
    for what in ("another document", "padding"):
        assert (
            max(ranks(3, poisoned, "ring", CAUSAL, Doubled(), spoilt_tokens(what), torch.nan))
            < 1e-12
        )


def test_what_does_see_rubbish_says_so():
    """A NaN is not swept under the carpet: whoever sees it is NaN, forward and backward."""
    span = packed([[6, 3]], 10)
    q, k, v = (torch.randn(1, 10, 2, 4, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        k[0, 2] = torch.nan
    out = Softmax(CAUSAL)((q,), (k, v), span=span)
    assert out[0, :, 0, 0].isnan().tolist() == [False] * 2 + [True] * 4 + [False] * 4
    out.sum().backward()
    assert v.grad[0, :, 0, 0].isnan().tolist() == [True] * 6 + [False] * 4
    assert q.grad[0, :, 0, 0].isnan().tolist() == [False] * 2 + [True] * 4 + [False] * 4


def extremes(env, method, policy, lengths, tokens):
    """Largest difference from one device on a row that leaves ranks with nothing to do."""
    span = packed([lengths], tokens)
    torch.manual_seed(5)
    whole = [
        torch.randn(1, tokens, heads, 4, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    want = Softmax(CAUSAL)((whole[0],), tuple(whole[1:]), span=span)
    (want * span.valid()[..., None, None]).sum().backward()
    driver, here = driven(env, method, CAUSAL, None, span, policy)
    mine = [here.sharding.shard(x.detach(), 0).requires_grad_() for x in whole]
    got = driver((mine[0],), tuple(mine[1:]), span=here)
    valid = here.valid()[..., None, None]
    (got * valid).sum().backward()
    assert got.isfinite().all()
    worst = (
        [relative(got * valid, here.sharding.shard(want.detach(), 0) * valid)]
        if valid.any()
        else []
    )
    assert all(not x.grad.masked_select(~valid).any() for x in mine), "padding has no gradient"
    worst += [
        (a.grad - here.sharding.shard(b.grad, 0)).abs().max().item() for a, b in zip(mine, whole)
    ]
    return max(worst), int(here.valid().sum())


@pytest.mark.parametrize("method", METHODS)
def test_ranks_without_tokens_and_rows_without_keys_are_no_trouble(method):
    for lengths, tokens in (([2], 3), ([1], 1), ([], 9), ([1] * 9, 9), ([1, 5], 40)):
        for policy in POLICIES:
            found = ranks(4, extremes, method, policy, lengths, tokens)
            assert max(worst for worst, _ in found) < 1e-12
            assert sum(tokens for _, tokens in found) == sum(lengths)
            if sum(lengths) < 4:
                assert min(tokens for _, tokens in found) == 0


def crossed(env, method):
    """Queries of one length, keys of another, each with a cut of its own: the largest difference
    from one device."""
    span, kv_span = packed([[5, 6], [3, 1]], 11), packed([[17, 4], [1, 19]], 23)
    from_all = Softmax(CAUSAL.b)
    torch.manual_seed(6)
    shapes = ((*span.shape, 4, 4), (*kv_span.shape, 2, 4), (*kv_span.shape, 2, 3))
    whole = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    want = from_all((whole[0],), tuple(whole[1:]), span=span, kv_span=kv_span)
    want.square().sum().backward()
    driver, here = driven(env, method, CAUSAL.b, None, span, "balanced")
    side = GRID_HEADS[env.size] if method == "usp" else 1
    there = shard_span(kv_span, layouts("zigzag", kv_span, env.size, heads=side), env.rank)
    mine = [
        s.sharding.shard(x.detach(), 0).requires_grad_()
        for s, x in zip((here, there, there), whole)
    ]
    got = driver((mine[0],), tuple(mine[1:]), span=here, kv_span=there)
    got.square().sum().backward()
    worst = [relative(got, here.sharding.shard(want.detach(), 0))]
    return max(
        worst
        + [
            relative(a.grad, s.sharding.shard(b.grad, 0))
            for s, a, b in zip((here, there, there), mine, whole)
        ]
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_source_of_another_length_has_a_cut_of_its_own(method):
    for size in (2, 3, 4):
        assert max(ranks(size, crossed, method)) < 1e-12
