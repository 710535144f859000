"""The bench of rows cut in time runs all its models, and what it times has the right gradients."""

import pytest
import torch

from scripts.benchmarks.time_pieces import TimeBenchmark, TimeSizes, measure, parse, table
from tests.support.pool import ranks

SIZES = TimeSizes(
    tokens=48, times=2, piece=20, compare=48, width=24, heads=3, layers=3, window=8, threads=1
)


def rows(env, sizes):
    return list(measure(sizes, env.group))


@pytest.mark.full
def test_every_model_is_measured_at_both_lengths():
    (found,) = ranks(1, rows, SIZES)
    assert [row["model"] for row in found] == ["rwkv7", "sliding", "hybrid"]
    for row in found:
        assert (row["few_tokens"], row["many_tokens"]) == (48, 96)
        assert row["price"] == row["pieces_seconds"] / row["checkpointing_seconds"]
    assert "hybrid" in table(found)


@pytest.mark.parametrize("name", ["hybrid", "hybrid_full"])
def test_both_ways_give_the_same_gradients(name):
    bench = TimeBenchmark(SIZES)
    gradients = []
    for again in (False, True):
        model = bench.model(name, again=again).double()
        model.zero_grad()
        step = bench.at_once(model, 48) if again else bench.in_pieces(model, 48)
        step()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_piece_longer_than_the_row_is_refused():
    with pytest.raises(ValueError, match="use smaller pieces"):
        parse(["piece=64", "tokens=32"])
    with pytest.raises(ValueError, match="use ranks=1"):
        parse(["ranks=2"])
    with pytest.raises(ValueError, match="models=rwkv7,lstm: choose of rwkv7, sliding"):
        parse(["models=rwkv7,lstm"])
