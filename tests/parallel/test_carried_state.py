"""What lanes keep between rows: the same on one device and over ranks, for rows cut in any way."""

import pytest
import torch

from models.carried_state import REPLICATED, SHARDED, CarriedState
from models.span import PADDING, Span
from parallel.carried_state import ShardedCarriedState
from parallel.collectives import Communicator
from parallel.layout import POLICIES, layouts
from parallel.partition import unit_ranges
from parallel.sharding import shard_span
from tests.support.pool import ranks

TOKENS, ALL = 11, 55
LANES = [
    [5, 30, 3, 100],
    [33, 7, 2, 100],
]  # lengths of the documents of two lanes, one after another


def rows(step: int, pad: int = 0) -> Span:
    """Row `step` of every lane; the last `pad` tokens of the first row are padding."""
    pos = torch.stack([torch.cat([torch.arange(n) for n in lane])[:ALL] for lane in LANES])
    doc = torch.stack(
        [torch.cat([torch.full((n,), i) for i, n in enumerate(lane)])[:ALL] for lane in LANES]
    )
    part = slice(step * TOKENS, (step + 1) * TOKENS)
    first = doc[:, part][:, :1]
    here = doc[:, part] - first
    if pad:
        here[0, TOKENS - pad :] = PADDING
    return Span.of(pos[:, part].clone(), here.clone())


def content(step: int) -> torch.Tensor:
    """[2, TOKENS, 3] numbers that say which token of which lane they are."""
    where = torch.arange(TOKENS) + step * TOKENS
    return torch.stack(
        [torch.stack([where + 1000 * lane, where, -where], 1) for lane in range(len(LANES))]
    ).double()


def walk(length: int, steps: int, pad_at: int = -1) -> list[tuple[torch.Tensor, Span]]:
    """What is found at each step on one device."""
    past, found = CarriedState(), []
    for step in range(steps):
        past.attach(rows(step, 4 if step == pad_at else 0))
        found.append(past.tokens("a", content(step), length))
        past.advance()
    return found


@pytest.mark.parametrize("length", [3, 11, 25])
def test_a_lane_finds_the_tokens_of_the_document_that_goes_on_and_no_others(length):
    for step, (x, span) in enumerate(walk(length, 5)):
        row = rows(step)
        for lane in range(len(LANES)):
            start, held = int(row.pos[lane, 0]), []
            for back in range(1, min(length, start) + 1):
                held.append((start - back, step * TOKENS - back + 1000 * lane))
            there = span.doc[lane] != PADDING
            assert (span.doc[lane][there] == row.doc[lane, 0]).all()
            assert [
                (int(p), int(v)) for p, v in zip(span.pos[lane][there], x[lane, :, 0][there])
            ] == held[::-1]


def test_nothing_is_found_behind_padding_or_in_another_document():
    _x, span = walk(6, 3, pad_at=1)[2]
    assert (span.doc[0] == PADDING).all()
    assert (span.doc[1] != PADDING).all()
    past = CarriedState()
    past.attach(rows(0))
    past.tokens("a", content(0), 6)
    past.advance()
    past.attach(rows(2))  # not the row that follows
    assert (past.tokens("a", content(2), 6)[1].doc == PADDING).all()


def test_a_step_that_is_computed_again_finds_what_it_found_and_keeps_no_gradient():
    past = CarriedState()
    past.attach(rows(0))
    past.tokens("a", content(0).requires_grad_(), 6)
    past.store("b", torch.ones(2, 1, requires_grad=True))
    past.advance()
    past.attach(rows(1))
    first = past.tokens("a", content(1), 6)[0]
    past.store("b", torch.zeros(2, 1))
    assert torch.equal(past.tokens("a", content(1), 6)[0], first) and not first.requires_grad
    assert past.state("b").eq(1).all() and not past.state("b").requires_grad
    past.advance()
    assert past.state("b").eq(0).all()


def over_ranks(env, policy: str, length: int):
    """What every rank finds at each step, and what they gather to at the end."""
    past, found = ShardedCarriedState(Communicator(env.group)), []
    for step in range(5):
        span = rows(step, 4 if step == 3 else 0)
        here = shard_span(span, layouts(policy, span, env.size), env.rank)
        past.attach(here)
        x, q_span = past.tokens("a", here.sharding.shard(content(step), 0), length)
        found.append((x, q_span.pos, q_span.doc, q_span.sharding.index(env.rank, 2)))
        mine = slice(*unit_ranges(6, env.size)[env.rank])
        past.store("b", torch.arange(6.0)[mine, None] + step, SHARDED)
        past.store("c", torch.full((2, 3), step), REPLICATED)
        past.advance()
    whole = past.export_state()
    past.import_state(whole)
    again = past.export_state()
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    return found, whole


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_together_keep_what_one_device_keeps(size, policy):
    for length in (4, 11, 25):
        one = CarriedState()
        expected = []
        for step in range(5):
            one.attach(rows(step, 4 if step == 3 else 0))
            expected.append(one.tokens("a", content(step), length))
            one.store("b", torch.arange(6.0)[:, None] + step, SHARDED)
            one.store("c", torch.full((2, 3), step), REPLICATED)
            one.advance()
        want = one.export_state()
        for found, whole in ranks(size, over_ranks, policy, length):
            assert set(whole) == set(want)
            assert all(torch.equal(whole[key], want[key]) for key in want)
            for (x, pos, doc, index), (x_one, at_one) in zip(found, expected):
                real = (index < length)[0]
                inside = index[:, real]
                assert torch.equal(doc[:, real], at_one.doc.gather(1, inside))
                there = doc[:, real] != PADDING
                assert torch.equal(pos[:, real][there], at_one.pos.gather(1, inside)[there])
                picked = x_one.gather(1, inside[..., None].expand(-1, -1, 3))
                assert torch.equal(x[:, real][there], picked[there])
