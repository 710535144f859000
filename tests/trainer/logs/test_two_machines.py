"""A run over two machines is told once, on the console of the first, and every style tells the same
facts."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support import forked_python
from tests.support.torchrun_here import free_port
from tests.test_architecture import ROOT

SMALL = (
    *("data=copy", "context_length=64", "batch_tokens=128", "parallel.context=2", "steps=3"),
    *("model.width=16", "model.layers=1", "model.heads=2", "match=parameters"),
    *("evaluation.every=2", "evaluation.batches=1", "evaluation.sample_tokens=0"),
    *("checkpoint.every=2", "log.plots=false", "wandb.mode=disabled", "log.on_event='false'"),
    *("launch=multinode", "launch.nodes=2"),
)
NUMBER = re.compile(r"\d[\d.,:]*[kMG]?")  # of times and speeds, too
STEP = re.compile(r"step +\d+/\d+  ")
FAILED_COMMAND = "log.on_event: start: exit status 1: it said nothing; the run goes on"


def consoles(folder: Path, *words: str) -> list[list[str]]:
    """The lines that each of two machines prints, on both of its streams."""
    folder.mkdir()
    place = (f"launch.rdzv_endpoint=127.0.0.1:{free_port()}", f"run_dir={folder / 'run'}")
    machines = []
    for number in range(2):
        own = (f"launch.node_rank={number}", f"launch.address=127.0.0.{2 + number}")
        machines.append(
            forked_python.Popen(
                [sys.executable, "-m", "trainer", *SMALL, *place, *own, *words],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "HOME": str(folder)},
            )
        )
    printed = [machine.communicate(timeout=250)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], printed
    return [[line for line in text.splitlines() if line.strip()] for text in printed]


def kinds(lines: list[str], folder: Path) -> list[str]:
    """Lines without their numbers and paths, in an order of their own."""
    return sorted(NUMBER.sub("#", line.replace(str(folder), "")).strip() for line in lines)


@pytest.mark.slow
def test_every_line_is_printed_once_by_one_machine(tmp_path: Path) -> None:
    first, second = consoles(tmp_path / "plain")
    assert len(second) == 1, second
    assert second[0].startswith("machine 1 of 2")
    assert "tells of the run" in second[0]
    repeated = [line for line, times in Counter(first).items() if times > 1]
    assert not repeated
    text = "\n".join(first)
    for fact in ("match", "step 1/3", "step 3/3", "finished after", FAILED_COMMAND):
        assert text.count(fact) == 1, fact


@pytest.mark.full
def test_every_style_tells_the_same_facts(tmp_path: Path) -> None:
    plain, _ = consoles(tmp_path / "plain")
    lines, others = consoles(tmp_path / "json", "log.console=json")
    events = [json.loads(line) for line in lines]
    assert [json.loads(line)["event"] for line in others] == ["line"]
    told = []
    for event in events:
        if event["event"] == "line":
            told += event["text"].splitlines()
    screen = next(index for index, line in enumerate(plain) if line.startswith("finished after"))
    said = [line for line in plain[:screen] if STEP.match(line) is None]
    said_kinds = [kind for kind in kinds(said, tmp_path / "plain") if kind]
    assert said_kinds == [kind for kind in kinds(told, tmp_path / "json") if kind]
    steps = [event for event in events if event["event"] == "step"]
    found = [line for line in plain if STEP.match(line)]
    assert len(steps) == len(found)
    for event, line in zip(steps, found, strict=True):
        assert f"step {event['step']}/3  loss {event['loss']:.4f}" in line
    [end] = [event for event in events if event["event"] == "end"]
    rest = "\n".join(plain[screen:])
    for name, path in end["found"]:
        assert f"{name:<11} {path}".replace("/json/", "/plain/") in rest
    for command in end["next"]:
        assert command.replace("/json/", "/plain/") in rest
    quiet, nothing = consoles(tmp_path / "quiet", "log.level=warning")
    assert nothing == []
    assert kinds(quiet, tmp_path / "quiet") == kinds(
        [FAILED_COMMAND, *plain[screen:]], tmp_path / "plain"
    )
    silent = consoles(tmp_path / "error", "log.level=error")
    assert silent == [[], []]
