"""Runs that go on with other steps: the learning rate stays what it was, or becomes what was asked
for; never silently."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.support.pool import ranks
from trainer.errors import BAD_CONFIG, UserError
from trainer.launch.elastic import RankInfo
from trainer.optim.lengthening import factor, go_on
from trainer.optim.schedules import Constant, Cosine, LinearSchedule, WarmupStableDecay
from trainer.preflight.prepare import load_config
from trainer.run_dir import make_run_dir, plain_config
from trainer.stages import run
from trainer.verify.whole_runs import write_documents

COMMON = (
    "context_length=48",
    "batch_tokens=96",
    "model.width=16",
    "model.layers=1",
    "model.heads=2",
    "data=files",
    "wandb.mode=disabled",
    "log.plots=false",
    "checkpoint.every=2",
    "evaluation.every=0",
    "schedule.warmup_steps=2",
    "optim.learning_rate=1",
    "engine=single",
)


def rates(schedule, stretches, steps):
    return [factor(schedule, stretches, step) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("schedule", "taken"),
    [(Constant(2), 4), (WarmupStableDecay(1, 2), 2), (Cosine(2), 2), (LinearSchedule(3, 0.5), 3)],
)
def test_a_schedule_that_does_not_depend_on_it_so_far_goes_on_as_if_it_had_been_so_long(
    schedule, taken
):
    stretches, said = go_on(schedule, go_on(schedule, [], 0, 4, None)[0], taken, 8, None)
    assert said == "steps=4 became 8: the learning rate so far does not depend on it"
    assert rates(schedule, stretches, 8) == rates(schedule, go_on(schedule, [], 0, 8, None)[0], 8)


@pytest.mark.parametrize(
    ("schedule", "taken", "steps"),
    [
        (Cosine(2), 4, 8),
        (Cosine(2), 3, 8),
        (LinearSchedule(2), 3, 4),
        (WarmupStableDecay(1, 2), 3, 8),
        (WarmupStableDecay(1, 6), 7, 8),
    ],
)
def test_one_that_does_is_refused_with_both_rates_and_the_ways_out(schedule, taken, steps):
    before = 8 if steps == 4 else 4 if taken < 5 else 20
    start, _ = go_on(schedule, [], 0, before, None)
    assert go_on(schedule, start, taken, before, None) == (start, "")
    with pytest.raises(
        UserError,
        match=rf"^steps={steps}: .* steps={before} and has taken {taken}; .*schedule.extend=hold",
    ):
        go_on(schedule, start, taken, steps, None)


def test_hold_restart_and_stretch_do_what_they_are_called_and_may_follow_one_another():
    schedule = Cosine(warmup_steps=2, final_ratio=0.1)
    start, _ = go_on(schedule, [], 0, 4, None)
    first = [schedule(step, 4) for step in range(1, 5)]
    held, said = go_on(schedule, start, 4, 8, "hold")
    assert rates(schedule, held, 8) == [*first, *[pytest.approx(0.1)] * 4]
    assert "schedule.extend=hold, the learning rate goes from 0.1 to 0.1 of its peak" in said
    again, _ = go_on(schedule, start, 4, 8, "restart")
    assert rates(schedule, again, 8) == first * 2
    stretched, _ = go_on(schedule, start, 4, 8, "stretch")
    assert rates(schedule, stretched, 8) == [*first, *(schedule(step, 8) for step in range(5, 9))]
    more, _ = go_on(schedule, held, 6, 10, "restart")
    assert rates(schedule, more, 10) == [*first, *[pytest.approx(0.1)] * 2, *first]
    assert go_on(schedule, more, 8, 10, "hold") == (
        more,
        "",
    ), "the same length again is no new stretch"


@pytest.fixture
def words(tmp_path):
    os.environ["HF_HUB_OFFLINE"] = "1"
    return (
        *COMMON,
        f"data.path={write_documents(tmp_path / 'text')}",
        f"data.cache={tmp_path / 'cache'}",
    )


@pytest.mark.parametrize("key", ["run_dir", "resume"])
def test_the_command_is_refused_before_the_ranks_start(tmp_path, words, key):
    directory = tmp_path / "run"
    (directory / "checkpoints" / "step_00000006").mkdir(parents=True)
    (directory / "config.yaml").write_text(
        yaml.safe_dump(plain_config(load_config([*words, "steps=8"])))
    )
    asked = (*words, f"{key}={directory}")
    load_config([*asked, "steps=8"])
    with pytest.raises(UserError, match=r"^steps=12: .*schedule.extend=hold") as refused:
        load_config([*asked, "steps=12"])
    assert refused.value.code == BAD_CONFIG and str(refused.value).count("\n") == 0
    load_config([*asked, "steps=12", "schedule.extend=restart"])
    with pytest.raises(
        UserError, match=r"^steps=5: the run in .* has taken 6 already; use steps=6 or more"
    ):
        load_config([*asked, "steps=5", "schedule.extend=hold"])


def in_rank(env, words, directory):
    config = load_config(words, started=env.size)
    place = RankInfo(env.rank, env.size, env.rank, env.size, torch.device("cpu"), "gloo")
    try:
        return run(config, place, Path(directory))
    except UserError as fault:
        return str(fault)


def test_a_run_keeps_what_was_asked_for_through_its_checkpoints(tmp_path, words):
    directory = tmp_path / "run"
    make_run_dir(directory)

    def went(*more):
        return ranks(1, in_rank, (*words, f"run_dir={directory}", *more), str(directory))[0]

    assert went("steps=4") == 0
    assert went("steps=8").startswith("steps=8: the run was made for steps=4")
    assert went("steps=6", "schedule.extend=hold") == 0
    assert went("steps=8", "schedule.extend=restart", "checkpoint.every=1") == 0
    shutil.rmtree(
        directory / "checkpoints" / "step_00000008"
    )  # as if it had been killed after step 7
    assert went("steps=8") == 0
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    schedule = Cosine(2, 0.1)
    first = [schedule(step, 4) for step in range(1, 5)]
    assert [row["learning_rate"] for row in rows] == pytest.approx([*first, 0.1, 0.1, 0.5, 1.0])
