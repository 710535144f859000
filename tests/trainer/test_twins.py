"""Jobs of a sweep that come to the same run are run once; what no job takes is refused."""

import os
import sys
from pathlib import Path

import pytest

from tests.support import forked_python
from trainer.errors import UserError
from trainer.logs.jsonl import METRICS
from trainer.sweep.batch import JOB_OF, check_jobs, told_again, twins
from trainer.sweep.hydra_launcher import SweepPlan
from trainer.sweep.jobs import DONE, Job, JobOutcome, outcome

ROOT = Path(__file__).parents[2]
SMALL = ("context_length=64", "batch_tokens=128", "model.width=32", "model.layers=2", "data=copy")


class Grid:
    """The part of a plan that is read."""

    searches = False
    stop_early = None


def jobs(folder: Path, *settings: str) -> list[Job]:
    return [
        Job(number, (*SMALL, *words.split()), folder / str(number))
        for number, words in enumerate(settings)
    ]


def test_jobs_with_equal_effective_configs_are_run_once_and_said(tmp_path: Path, capsys) -> None:
    plan: SweepPlan = Grid()  # pyright: ignore
    wished = ("mixer=full position=rope", "mixer=full position=none")
    dropped = ("mixer=gated_delta position=rope", "mixer=gated_delta position=alibi")
    made, effective = jobs(tmp_path, *wished, *dropped), {}
    check_jobs(made, [], plan, effective)
    assert twins(made, effective) == {3: 2}
    assert "nothing in this model takes a position" in capsys.readouterr().out
    made[2].directory.mkdir()
    (made[2].directory / METRICS).write_text('{"step": 1}\n')
    told_again(made[3], made[2], JobOutcome(list(made[2].settings), DONE, 0, 3.0))
    again = outcome(made[3])
    assert again is not None and (again.outcome, again.message) == (DONE, "the same run as job 2")
    assert (made[3].directory / METRICS).read_text() == '{"step": 1}\n'


def test_a_setting_that_no_job_takes_is_refused(tmp_path: Path) -> None:
    plan: SweepPlan = Grid()  # pyright: ignore
    with pytest.raises(UserError, match="nothing in this model takes a position"):
        check_jobs(
            jobs(tmp_path, "mixer=gated_delta position=rope", "mixer=hyena position=rope"),
            [],
            plan,
            {},
        )


def test_a_job_of_a_sweep_starts_with_the_settings_that_only_other_jobs_take(
    tmp_path: Path,
) -> None:
    """What the sweep has said is not refused again by the command of the job; the same words of a
    user are."""
    words = [
        *SMALL,
        "mixer=hyena",
        "position=alibi",
        "model.heads=2",
        "launch.dry_run=true",
        f"run_dir={tmp_path / 'job'}",
    ]
    for of_sweep, code in (([JOB_OF, str(os.getpid())], 0), ([], 2)):
        done = forked_python.run([sys.executable, "-m", "trainer", *of_sweep, *words], cwd=ROOT)
        assert done.returncode == code, done.stderr
        assert (
            done.stderr.count("reaches no part")
            == done.stderr.count("takes a position")
            == (1 if code else 0)
        )
