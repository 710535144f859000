"""The user's command is told of every event; it cannot end, slow or outlive a run, and nothing of a
run reaches a shell."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.launch.elastic import SECRET
from trainer.logs.console import Console
from trainer.logs.event_command import EventCommand, check_on_event
from trainer.logs.jsonl import MetricsRow
from trainer.logs.run_logger import RunLogger

LISTENER = """import json, os, sys
event = json.load(sys.stdin)
assert event == json.loads(os.environ["LONGSPAN_FACTS"]) and len(sys.argv) == 2
assert event["event"] == os.environ["LONGSPAN_EVENT"]
event["secret"] = "SECRET" in os.environ
with open(sys.argv[1], "a") as file:
    file.write(json.dumps(event) + "\\n")
""".replace("SECRET", SECRET)


def config(*words: str) -> Config:
    found = compose(words)
    assert found.config is not None and not found.faults, found.faults
    return found.config


def row(step: int, norm: float = 1.0, skipped: dict | None = None) -> MetricsRow:
    return MetricsRow(step, 3.0, 64 * step, 1000.0, 0.5, norm, 1e-3, 10**9, None, skipped=skipped)


def listener(folder: Path) -> str:
    script = folder / "listen.py"
    script.write_text(LISTENER)
    return f"{sys.executable} {script} {folder / 'heard'}"


def heard(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "heard").read_text().splitlines()]


def test_a_run_tells_of_its_start_spikes_skipped_steps_and_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET, "of the ranks")
    name = "x';touch '$(touch y)`touch z`"
    wish = config("logger=[]", f"log.on_event='{listener(tmp_path)}'")
    wish = wish.model_copy(update={"name": name})
    run = tmp_path / "run"
    log = RunLogger(run, wish, Console(9, speaks=False), writes=True)
    monkeypatch.chdir(tmp_path)
    log.open(0, None)
    for step in range(1, 21):
        log.step(row(step))
    log.step(row(21, 50.0))
    log.step(row(22, skipped={"why": "token=s3cret is not finite"}))
    log.close(22, 1, {})
    events = heard(tmp_path)
    assert [event["event"] for event in events] == ["start", "spike", "skip", "end"]
    assert all(event["name"] == name and event["run_dir"] == str(run) for event in events)
    assert not any(event["secret"] for event in events)
    assert events[0]["steps"] == 100
    assert (events[1]["step"], events[1]["grad_norm"], events[1]["usual"]) == (21, 50.0, 1.0)
    assert events[2]["step"] == 22 and "s3cret" not in events[2]["why"]
    assert events[3]["outcome"] == "stopped at step 22 of 100" and events[3]["best_loss"] == 3.0
    assert not any((tmp_path / made).exists() for made in "xyz")


def test_other_ranks_run_no_command(tmp_path: Path) -> None:
    wish = config("logger=[]", f"log.on_event='{listener(tmp_path)}'")
    log = RunLogger(tmp_path / "run", wish, Console(9, speaks=False), writes=False)
    log.open(0, None)
    log.step(row(1, skipped={"why": "x"}))
    log.close(1, 1, {})
    assert log.on_event is None and not (tmp_path / "heard").exists()


def test_a_run_that_fails_tells_why(tmp_path: Path) -> None:
    wish = config("logger=[]", f"log.on_event='{listener(tmp_path)}'")
    log = RunLogger(tmp_path / "run", wish, Console(9, speaks=False), writes=True)
    log.open(3, None)
    with pytest.raises(RuntimeError), log.alerting():
        raise RuntimeError("the cause")
    [start, end] = heard(tmp_path)
    assert start["step"] == 3 and end["event"] == "end"
    assert end["outcome"] == "failed" and end["why"] == "RuntimeError: the cause"


def test_a_command_that_fails_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    command = EventCommand(
        f"{sys.executable} -c \"import sys; sys.exit('no mail')\"", tmp_path, "mine", said.append
    )
    for _ in range(3):
        command.tell("skip")
    command.close()
    assert said == ["log.on_event: skip: exit status 1: no mail; the run goes on"]


def test_a_command_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    said: list[str] = []
    note = tmp_path / "pid"
    command = EventCommand(
        f"sh -c 'sleep 600 & echo $! > {note}; wait'", tmp_path, "mine", said.append, limit_s=0.5
    )
    begun = time.monotonic()
    command.tell("start")
    assert time.monotonic() - begun < 0.1
    command.close()
    assert said == ["log.on_event: start: not done within 0.5 s, and killed; the run goes on"]
    assert _ended(int(note.read_text()))


def test_the_end_of_a_run_waits_for_no_command_for_ever(tmp_path: Path) -> None:
    said: list[str] = []
    command = EventCommand("sleep 600", tmp_path, "mine", said.append)
    command.tell("end")
    begun = time.monotonic()
    command.close(wait_s=0.3)
    assert time.monotonic() - begun < 5 and "not done 0.3 s after the run" in said[0]
    assert command.running is not None and command.running.wait(10) != 0


def _ended(process: int) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            # A process that nobody has waited for counts as ended.
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(process, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("no-such-program x", "there is no program no-such-program that may be run"),
        ("say 'it", "it cannot be read as a command (no closing quotation)"),
        (" ", "it is empty"),
    ],
)
def test_a_command_that_cannot_be_run_is_refused(command: str, said: str) -> None:
    wish = config()
    wish = wish.model_copy(update={"log": wish.log.model_copy(update={"on_event": command})})
    [fault] = check_on_event(wish)
    assert fault.fact == said and fault.remedy and list(check_on_event(config())) == []
