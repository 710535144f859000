"""Plans of DeepSpeed are of its own code: they hold and send what its ranks hold and send."""

import os

import pytest
from torch import nn

from tests.support.pool import Pool
from tests.trainer.planning.test_step_plan import WORDS, config_of, measured
from trainer.errors import UserError
from trainer.planning.advice import require_plannable
from trainer.planning.devices import read_device
from trainer.planning.step_plan import plan_step

WIDE = (
    "engine=deepspeed",
    "parallel.data=2",
    "model.width=256",
    "context_length=96",
    "batch_tokens=192",
)
STAGES = [(0, "float32"), *((stage, p) for stage in (1, 2, 3) for p in ("float32", "bfloat16"))]


def words_of(stage, precision):
    return (*WIDE, f"engine.zero_stage={stage}", f"precision={precision}")


def plan(stage, precision="float32", rank=0):
    return plan_step(config_of(words_of(stage, precision)), WORDS, rank, read_device("cpu"))


def on_fresh_ranks(words):
    """As `ranks`: DeepSpeed holds on to an engine, whose end the next step would be measured by."""
    pool = Pool(2)
    try:
        return pool.run(measured, (words,))
    finally:
        pool.close(politely=True)


@pytest.mark.full
@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_the_planned_peak_is_the_measured_one(stage, precision):
    steps = on_fresh_ranks(words_of(stage, precision))
    for rank in (0, 1):
        peak = plan(stage, precision, rank).peak_bytes
        assert peak == pytest.approx(steps[rank].peak_bytes, rel=0.02)


def test_stages_hold_and_send_what_is_theirs():
    plans = {stage: plan(stage) for stage in (0, 2, 3)}
    sent = {stage: each.costs.sent for stage, each in plans.items()}
    here = "within a machine"
    whole = sent[0]["allreduce", here]
    # Whole weights; whole weights and half of the masters; half of both and what stays whole.
    weights = plans[0].by_kind["weights"]
    assert plans[2].by_kind["weights"] == pytest.approx(1.5 * weights, rel=0.01)
    assert plans[3].by_kind["weights"] == pytest.approx(weights, rel=0.1)
    assert plans[2].by_kind["optimiser"] == pytest.approx(weights, rel=0.01)
    assert plans[0].by_kind["optimiser"] == pytest.approx(2 * weights, rel=0.01)
    # Gradients as large as weights are summed; each of two ranks sends half of the new weights.
    assert whole == pytest.approx(weights, rel=0.01)
    assert sent[2]["allgather_base", here] == pytest.approx(weights / 2, rel=0.01)
    assert sent[3]["reduce_scatter_base", here] == pytest.approx(weights / 2, rel=0.01)
    # The bucket of 25 million numbers.
    assert plans[2].peak_bytes > 100_000_000 > plans[0].peak_bytes


def test_what_is_put_in_place_for_a_plan_is_taken_away():
    from deepspeed.runtime.zero import stage_1_and_2

    before = nn.Module._apply, stage_1_and_2.DeepSpeedZeroOptimizer.has_overflow
    asked = dict(os.environ)
    plan(1)
    assert before == (nn.Module._apply, stage_1_and_2.DeepSpeedZeroOptimizer.has_overflow)
    assert {name: value for name, value in os.environ.items() if name in asked} == asked
    assert "LOCAL_RANK" in asked or "LOCAL_RANK" not in os.environ


def test_shards_on_the_host_are_refused():
    config = config_of(("engine=deepspeed", "parallel.data=2", "launch.force=true"))
    config = config.model_copy(
        update={"engine": config.engine.model_copy(update={"offload": "optimizer"})}
    )
    with pytest.raises(UserError, match=r"engine\.offload=optimizer: "):
        require_plannable(config)
