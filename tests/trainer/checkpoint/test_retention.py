"""One checkpoint every so many steps and the best ones stay, whatever else is deleted, also when
the run is killed and goes on."""

import json
from pathlib import Path

import pytest
import torch

from trainer.checkpoint.keep_rules import check_keep_rules, retention_of
from trainer.checkpoint.retention import CheckpointRetention, better_of, figure_scores
from trainer.checkpoint.writer import CheckpointWriter
from trainer.config.compose import compose
from trainer.config.schema import Config

# Held-out loss by step: the best are 300, then 500, then 600.
LOSSES = {100: 4.0, 200: 3.5, 300: 1.0, 400: 3.0, 500: 1.5, 600: 2.0, 700: 9.0, 800: 8.0}


def config(*words: str) -> Config:
    found = compose(words)
    assert found.config is not None and not found.faults, found.faults
    return found.config


def evaluated(run: Path, step: int, name: str = "held_out_loss") -> None:
    run.mkdir(exist_ok=True)
    with open(run / "evaluation.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "name": name, "value": LOSSES[step]}) + "\n")


def present(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))


def writer(run: Path, *words: str, ends: tuple[int, ...] = ()) -> CheckpointWriter:
    wish = config(*words).checkpoint
    return CheckpointWriter(
        run / "checkpoints",
        keep=wish.keep,
        retention=retention_of(wish, ends, run),
        say=lambda text: None,
    )


def trained(run: Path, steps: list[int], *words: str, ends: tuple[int, ...] = ()) -> None:
    """A part of a run: it saves, and evaluates after that, as the loop does."""
    checkpoints = writer(run, *words, ends=ends)
    for step in steps:
        checkpoints.save(step, {"x": torch.tensor([float(step)])}, {})
        evaluated(run, step)
    checkpoints.close()


def test_the_newest_the_best_and_one_of_every_so_many_stay(tmp_path: Path) -> None:
    words = ("checkpoint.keep=1", "checkpoint.keep_best=2", "checkpoint.keep_every=400")
    # Begun anew in the middle, as after a kill: the choice is on disk.
    trained(tmp_path, [100, 200, 300, 400], *words)
    trained(tmp_path, [500, 600, 700, 800], *words)
    assert present(tmp_path) == [300, 400, 500, 800]


def test_steps_taken_again_are_judged_by_their_new_figures(tmp_path: Path) -> None:
    words = ("checkpoint.keep=1", "checkpoint.keep_best=1")
    trained(tmp_path, [100, 200, 300], *words)
    # What 300 comes to was not known when it was written, so the best before it is there still.
    assert present(tmp_path) == [200, 300]
    # The run goes on from 100 again, where 300 comes out worse.
    kept = (tmp_path / "evaluation.jsonl").read_text().splitlines()
    (tmp_path / "evaluation.jsonl").write_text(kept[0] + "\n")
    checkpoints = writer(tmp_path, *words)
    checkpoints.forget_after(100)
    checkpoints.close()
    trained(tmp_path, [500, 600, 700], *words)
    assert present(tmp_path) == [500, 700]


def test_the_ends_of_stages_stay_beside_the_others(tmp_path: Path) -> None:
    trained(tmp_path, [100, 200, 300, 400, 500], "checkpoint.keep=1", ends=(200,))
    assert present(tmp_path) == [200, 500]


def test_one_stays_of_every_stretch_whatever_steps_were_saved() -> None:
    rule = CheckpointRetention(newest=1, every=1000)
    there: set[int] = set()
    # Irregular, as signals make them; a stretch of 1000 may have none.
    for step in (300, 600, 990, 1040, 1080, 1990, 3100, 3900, 4000, 4010):
        there = rule.steps_to_keep({*there, step})
    assert there == {1040, 3100, 4000, 4010}


def test_figures_may_be_the_highest_and_of_another_evaluation(tmp_path: Path) -> None:
    for step in LOSSES:
        evaluated(tmp_path, step, "needle/accuracy")
    assert better_of("needle/accuracy") == "highest" and better_of("x/loss") == "lowest"
    scores = figure_scores(tmp_path, "needle/accuracy", "highest")
    assert CheckpointRetention(1, best=2, scores=scores).steps_to_keep(LOSSES) == {700, 800}


def test_a_record_that_cannot_be_read_costs_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "evaluation.jsonl").write_text("nonsense\n" + '{"step": 1}\n')
    said: list[str] = []
    checkpoints = writer(tmp_path, "checkpoint.keep=1", "checkpoint.keep_best=1")
    checkpoints.say = said.append
    for step in (1, 2):
        checkpoints.save(step, {"x": torch.zeros(1)}, {})
    checkpoints.close()
    assert present(tmp_path) == [1, 2] and "old checkpoints stay" in said[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("evaluation.every=0",), "goes by held_out_loss, but evaluation.every=0"),
        (("checkpoint.best=needle/accuracy",), "no evaluation needle is chosen, only heldout"),
        (("evaluation.every=40",), "so that some would have no figure"),
        (("checkpoint.every=0",), "so that some would have no figure"),
    ],
)
def test_best_ones_that_could_not_be_known_are_refused(words: tuple[str, ...], said: str) -> None:
    [fault] = check_keep_rules(config("checkpoint.keep_best=1", *words))
    assert said in fault.fact and fault.remedy
    assert list(check_keep_rules(config("checkpoint.keep_best=1"))) == []
