"""Steps that pass, fail, break, hang or come too late: what the check of a GPU makes of them."""

import json
import sys

import pytest

from scripts.gpu_checks import conductor
from scripts.gpu_checks.__main__ import main
from scripts.gpu_checks.conductor import ENDING_S, Conductor
from scripts.gpu_checks.schedule import STEPS, Step, seconds_for

SPEAKS = """
import json, sys, time
def tell(**row): print(json.dumps(row), flush=True)
print("a library says hello")
{before}
tell(ready=0.1)
word, seconds = sys.stdin.readline().split()
assert word == "go" and float(seconds) > 0
{work}
"""
ENDS = "tell(ended=True, seconds=0.1)"
WORK = {
    "passes": f"tell(figure=1.5); {ENDS}",
    "fails": "tell(figure=2, passed=False); tell(ended=False, seconds=0.1); sys.exit(1)",
    "breaks": "raise ValueError",
    "hangs": "tell(figure=3); time.sleep(60)",
    "beside": f"tell(figure=4); {ENDS}",
    "late": ENDS,
}


class Rehearsed(Conductor):
    """A conductor whose steps are a few lines each."""

    def command(self, step):
        before = "sys.exit(3)" if step.name == "unprepared" else ""
        script = SPEAKS.format(before=before, work=WORK.get(step.name, ENDS))
        return [sys.executable, "-S", "-c", script]


def conducted(tmp_path, monkeypatch, steps, limit=8.0):
    monkeypatch.setattr(conductor, "GRACE_S", 0.0)
    monkeypatch.setattr(conductor, "FEWEST_S", 0.1)
    failed = Rehearsed(steps, tmp_path, ENDING_S + limit, dry=True).run()
    lines = (tmp_path / "gpu_check.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    outcomes = {row["step"]: row["outcome"] for row in rows if "outcome" in row}
    return failed, rows, outcomes


def test_no_step_stops_the_others(tmp_path, monkeypatch):
    names = "passes fails breaks hangs unprepared beside"
    steps = [Step(name, name, 1, 30 if name != "hangs" else 0.5) for name in names.split()]
    failed, rows, outcomes = conducted(tmp_path, monkeypatch, steps)
    assert outcomes == {
        "unprepared": "ended by itself, status 3",
        "passes": "passed",
        "fails": "failed",
        "breaks": "ended by itself, status 1",
        "hangs": "cut off",
        "beside": "passed",
    }
    assert failed == 4
    figures = {row["step"]: row["figure"] for row in rows if "figure" in row}
    assert figures == {"passes": 1.5, "fails": 2, "hangs": 3, "beside": 4}
    page = (tmp_path / "gpu_check.md").read_text()
    assert "| hangs | cut off |" in page and "| 1.5 |" in page
    log = (tmp_path / "gpu_check.log").read_text()
    assert "passes: a library says hello" in log and "ValueError" in log


def test_what_comes_too_late_is_not_begun(tmp_path, monkeypatch):
    steps = [Step("hangs", "hangs", 1, 30), Step("late", "late", 0.01, 30)]
    failed, _, outcomes = conducted(tmp_path, monkeypatch, steps, limit=1.0)
    assert outcomes == {"hangs": "cut off", "late": "not begun"}
    assert failed == 2


def test_neighbours_that_may_run_together_do(tmp_path, monkeypatch):
    steps = [
        Step("hangs", "hangs", 1, 1.5, together=True),
        Step("beside", "beside", 1, 1.5, together=True),
        Step("passes", "passes", 1, 5),
    ]
    _, rows, outcomes = conducted(tmp_path, monkeypatch, steps)
    assert outcomes == {"hangs": "cut off", "beside": "passed", "passes": "passed"}
    order = [row["step"] for row in rows if "outcome" in row]
    assert order == ["beside", "hangs", "passes"]


@pytest.mark.parametrize("limit", [230, 800])
def test_every_step_gets_a_turn_that_is_worth_it(limit):
    left = limit - ENDING_S
    waiting = list(STEPS)
    together = [step for step in STEPS if step.together]
    left -= seconds_for(waiting, left)
    waiting = [step for step in STEPS if step not in together]
    while waiting:
        given = seconds_for(waiting, left)
        assert given >= 8, waiting[0]
        left -= given
        waiting = waiting[1:]
    assert left >= 0


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("LIMIT", "ten", "LIMIT=ten: must be seconds, at least 60; use 800"),
        ("LIMIT", "5", "LIMIT=5: must be seconds"),
        ("DRY", "yes", "DRY=yes: must be 0 or 1"),
        ("ONLY", "ring rings", "rings: there is no such step; there are drivers"),
    ],
)
def test_a_mistake_gives_one_message(monkeypatch, capsys, name, value, message):
    monkeypatch.setenv(name, value)
    assert main([]) == 2
    assert message in capsys.readouterr().err
