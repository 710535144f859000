"""Sums of a step: over micro-batches, then over ranks, by name."""

import torch

from tests.support.pool import ranks
from trainer.step.sums import StepSums


def added(env):
    sums = StepSums()
    for number in range(3):
        loss = torch.tensor(float(number), requires_grad=True)
        sums.add({"loss": loss * (env.rank + 1), "layer/load": torch.tensor([1, env.rank])})
    return sums.over(env.group)


def test_every_rank_gets_the_sums_of_all():
    for found in ranks(3, added):
        assert found["loss"].item() == 3 * (1 + 2 + 3) and not found["loss"].requires_grad
        assert found["layer/load"].tolist() == [9, 9] and found["layer/load"].dtype == torch.float64


def test_one_process_keeps_its_own():
    sums = StepSums()
    sums.add({"b": torch.ones(2), "a": torch.tensor(2.0)})
    assert {name: value.tolist() for name, value in sums.over(None).items()} == {
        "a": 2.0,
        "b": [1.0, 1.0],
    }


def figured(env):
    sums = StepSums()
    sums.add({"loss": torch.tensor(1.0), "z/load": torch.ones(2), "a": torch.tensor(2.0)})
    norm = torch.tensor(float(env.rank), dtype=torch.float64)
    plain = sums.read(env.group, norm)
    sums.add({"loss": torch.tensor(float("nan") if env.rank == 1 else 0.0)})
    return plain, sums.read(env.group, norm)


def test_a_step_reads_its_sums_its_norm_and_whether_any_rank_is_not_finite():
    for rank, (plain, spoilt) in enumerate(ranks(3, figured)):
        assert {name: total.tolist() for name, total in plain.totals.items()} == {
            "loss": 3.0,
            "z/load": [3.0, 3.0],
            "a": 6.0,
        }
        assert plain.norm == rank and plain.largest.tolist() == [3.0, 2.0]
        assert spoilt.largest.tolist() == [float("inf"), 2.0]
