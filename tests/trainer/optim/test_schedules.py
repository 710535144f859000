"""Every schedule rises to the peak over its warm-up and is `final` at the last step."""

import math

import pytest

from trainer.optim.schedules import Constant, Cosine, LinearSchedule, WarmupStableDecay

FALLING = [Cosine, LinearSchedule, lambda **kw: WarmupStableDecay(decay_steps=30, **kw)]


@pytest.mark.parametrize("kind", [Constant, Cosine, LinearSchedule, WarmupStableDecay])
def test_warm_up_is_a_straight_line_that_trains_from_step_one(kind):
    schedule = kind(warmup_steps=4)
    assert [schedule(step, 100) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.every_case
@pytest.mark.parametrize("kind", FALLING)
@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_it_ends_at_final_and_never_rises_after_the_warm_up(kind, warmup_steps, final):
    schedule = kind(warmup_steps=warmup_steps, final_ratio=final)
    factors = [schedule(step, 100) for step in range(max(1, warmup_steps), 101)]
    assert math.isclose(factors[-1], final, abs_tol=1e-12)
    assert all(a >= b for a, b in zip(factors, factors[1:]))
    assert factors[0] > 0.9 or final == 1.0


def test_the_middle_of_each_shape():
    assert math.isclose(Cosine(final_ratio=0.2)(50, 100), 0.6)
    assert math.isclose(LinearSchedule(final_ratio=0.2)(50, 100), 0.6)
    assert Constant(warmup_steps=3)(50, 100) == 1.0
    assert WarmupStableDecay(warmup_steps=5, decay_steps=20)(80, 100) == 1.0
    assert math.isclose(
        WarmupStableDecay(warmup_steps=5, decay_steps=20)(85, 100), 1 - math.sqrt(0.25)
    )


@pytest.mark.parametrize("kind", [Constant, Cosine, LinearSchedule, WarmupStableDecay])
def test_a_warm_up_longer_than_the_run_is_followed_to_the_letter(kind):
    assert kind(warmup_steps=10)(5, 5) == 0.5


@pytest.mark.parametrize("kind", [Constant, Cosine, LinearSchedule, WarmupStableDecay])
def test_one_step_is_a_run_too(kind):
    assert 0.0 <= kind()(1, 1) <= 1.0


@pytest.mark.parametrize(
    "kind, wrong",
    [
        (Constant, {"warmup_steps": -1}),
        (Cosine, {"final_ratio": 1.1}),
        (LinearSchedule, {"final_ratio": -0.1}),
        (WarmupStableDecay, {"decay_steps": -1}),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(kind, wrong):
    with pytest.raises(ValueError, match=f"schedule.{next(iter(wrong))}="):
        kind(**wrong)
