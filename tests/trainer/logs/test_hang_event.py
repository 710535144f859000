"""A hang is told once, by a rank that is well; where rank 0 hangs, the end is told for it."""

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import forked_python
from tests.test_architecture import ROOT
from tests.trainer.logs.test_event_command import config, heard
from trainer.config.schema import Config
from trainer.errors import BAD_RUN
from trainer.logs.console import Console
from trainer.logs.jsonl import MetricsRow
from trainer.logs.loggers.base import Logger, RunStart
from trainer.logs.run_logger import RunLogger
from trainer.watchdog import CLAIM, STILL_S, Hang, claim

SMALL = (
    *("data=copy", "context_length=64", "batch_tokens=64", "parallel.context=2", "steps=4"),
    *("model.width=16", "model.layers=1", "model.heads=2", "evaluation.every=0"),
    *("evaluation.sample_tokens=0", "checkpoint.every=0", "wandb.mode=disabled"),
)


class Stuck(Logger):
    """Never comes back from the second step, on the thread of the run."""

    background = False

    def open(self, run: RunStart) -> None:
        pass

    def step(self, row: MetricsRow) -> None:
        while row.step == 2:
            time.sleep(0.1)

    def evaluation(self, step: int, name: str, value: float, made_of: Any) -> None:
        pass


@pytest.mark.full  # it waits for half a minute, until a rank counts as hanging
def test_a_hang_of_rank_0_is_told_by_the_rank_that_waits_for_it(tmp_path: Path) -> None:
    own = (
        *("logger=[]", f"logger.stuck._target_={__name__}.Stuck"),
        *("launch.timeout_s=2", "launch.grace_s=1", f"run_dir={tmp_path / 'run'}"),
        f"log.on_event='tee -a {tmp_path / 'heard'}'",
    )
    command = [sys.executable, "-m", "trainer", *SMALL, *own]
    done = forked_python.run(command, cwd=ROOT, timeout=120)
    assert done.returncode == BAD_RUN, done.stdout + done.stderr
    start, hang, end = heard(tmp_path)
    assert [start["event"], hang["event"], end["event"]] == ["start", "hang", "end"]
    assert "rank 0 of 2 did not come" in hang["why"]
    assert "step 2" in hang["why"]
    assert end["outcome"] == "failed"
    assert hang["why"] in done.stderr


def note(folder: Path, waits: bool, age_s: float) -> None:
    """Writes the note of rank 0."""
    folder.mkdir(exist_ok=True)
    text = json.dumps([3, 2, "forward", "", waits, time.time() - age_s])
    (folder / "rank_00000").write_text(text + "\0")


def failed(folder: Path, error: Exception, *, rank: int, waits: bool, age_s: float = 0.0) -> None:
    """Ends a run by an error, as this rank does.

    Args:
        waits: whether rank 0 does, by its note.
        age_s: of that note.
    """
    wish = wished(f"log.on_event='tee -a {folder / 'heard'}'")
    log = RunLogger(
        folder / "run",
        wish,
        Console(9, speaks=False),
        writes=rank == 0,
        notes=folder / "notes",
    )
    log.open(0, None)
    note(folder / "notes", waits, age_s)
    with pytest.raises(type(error)), log.alerting():
        raise error


@functools.cache
def wished(word: str) -> Config:
    return config("logger=[]", word)


def events(folder: Path) -> list[str]:
    return [event["event"] for event in heard(folder)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.logs.event_command.FIRST_S", 0.01)


def test_where_rank_0_waits_as_well_each_event_is_told_once(tmp_path: Path, quick: None) -> None:
    failed(tmp_path, Hang("x"), rank=1, waits=True)
    failed(tmp_path, Hang("x"), rank=2, waits=True)
    assert events(tmp_path) == ["hang"]
    failed(tmp_path, Hang("x"), rank=0, waits=True)
    assert events(tmp_path) == ["hang", "start", "end"]


@pytest.mark.parametrize(("waits", "age_s"), [(False, 0.0), (True, STILL_S + 5)])
def test_where_rank_0_hangs_or_is_stopped_its_end_is_told_too(
    tmp_path: Path, waits: bool, age_s: float
) -> None:
    failed(tmp_path, Hang("x"), rank=2, waits=waits, age_s=age_s)
    failed(tmp_path, Hang("x"), rank=1, waits=waits, age_s=age_s)
    assert events(tmp_path) == ["hang", "end"]
    # It wakes up, and its peers are gone.
    failed(tmp_path, RuntimeError("connection closed"), rank=0, waits=False)
    assert events(tmp_path) == ["hang", "end", "start"]


def test_a_wait_for_a_rank_0_that_failed_is_no_hang(tmp_path: Path) -> None:
    failed(tmp_path, ValueError("the cause"), rank=0, waits=False)
    failed(tmp_path, Hang("x"), rank=1, waits=False)
    assert events(tmp_path) == ["start", "end"]


def test_one_claim_holds_and_one_rank_needs_none(tmp_path: Path) -> None:
    assert claim(tmp_path, "hang")
    assert not claim(tmp_path, "hang")
    assert claim(tmp_path, "end")
    assert claim(tmp_path / "missing", "hang")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{CLAIM}end", f"{CLAIM}hang"]
