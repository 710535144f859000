"""The logs of a run: summary.json, what W&B is given, and what a run that goes on leaves as it
was."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.analysis.attention_maps import AttentionMap
from models.span import Span
from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.logs import run_logger, summary
from trainer.logs.console import Console
from trainer.logs.jsonl import MetricsRow
from trainer.logs.loggers import wandb

BARS = [{"begin": 0, "end": 1, "loss": 2.5, "tokens": 9}]


class Recorder:
    """In the place of the W&B logger: keeps what it is given."""

    def __init__(self, directory: Path, **settings: Any):
        self.settings, self.given, self.identity, self.place = settings, [], "abc", "there"

    def step(self, row: MetricsRow) -> None:
        self.given.append(row.step)

    def alert(self, title: str, text: str) -> None:
        self.alerts = [*getattr(self, "alerts", []), title]

    def evaluation(
        self, step: int, name: str, value: float, by_position: Any = None, cells: Any = None
    ) -> None:
        self.given.append((step, name, value, by_position))

    def finish(
        self, told: dict[str, Any], images: Any, *, tables: Any, checkpoint: Path | None = None
    ) -> None:
        self.given.append((told, [image.name for image in images], checkpoint))
        self.tables = tables


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        wandb,
        "importlib",
        SimpleNamespace(import_module=lambda name: SimpleNamespace(WandbLogger=Recorder)),
    )


def config(*words: str) -> Config:
    found = compose(["name=mine", *words])
    assert found.config is not None and not found.faults, found.faults
    return found.config


def row(step: int, loss: float) -> MetricsRow:
    return MetricsRow(step, loss, 64 * step, 100.0 * step, 0.5, 1.0, 1e-3, 10**6 * step, None)


def made(directory: Path, wish: Config, *, writes: bool = True) -> run_logger.RunLogger:
    return run_logger.RunLogger(directory, wish, Console(3, speaks=False), writes=writes)


def test_a_run_notes_its_facts_and_wandb_gets_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000002").mkdir()
    told = {"commit": "c0ffee", "diff": "+ secret line", "command": ["x", "data.hf_token=abc"]}
    (tmp_path / "environment.json").write_text(json.dumps(told))
    log = made(tmp_path, config("wandb.group=g", "wandb.tags=[a,b]", "wandb.artifacts=true"))
    assert log.open(0, None, parameters=7, sent_bytes_per_step=None) == "abc"
    assert summary.read(tmp_path) == {"parameters": 7, "sent_bytes_per_step": None}
    log.note(sent_bytes_per_step=5)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        log.step(row(step, loss))
    log.evaluation(3, "held_out_loss", 2.5, tokens=9, by_position=BARS)
    assert log.close(3, 192, {"held_out_loss": 2.25}) == "there"
    facts = {"step": 3, "tokens": 192, "best_loss": 1.0, "best_held_out_loss": 2.25}
    facts |= {
        "tokens_per_second": 250.0,
        "peak_memory_bytes": 3e6,
        "parameters": 7,
        "sent_bytes_per_step": 5,
    }
    assert summary.read(tmp_path) == facts
    sent = log.wandb.run
    assert sent.given[:4] == [1, 2, 3, (3, "held_out_loss", 2.5, BARS)]
    assert sent.given[4] == (
        facts,
        ["loss.png", "loss_by_position.png"],
        tmp_path / "checkpoints" / "step_00000003",
    )
    assert sent.tables == {}
    labels = sent.settings["labels"]
    assert (labels.name, labels.group, labels.tags) == ("mine", "g", ("a", "b"))
    code = sent.settings["config"]["code"]
    assert (
        code["commit"] == "c0ffee"
        and code["changed"] is True
        and code["command"] == ["x", "data.hf_token=***"]
    )
    assert "secret line" not in str(sent.settings)


def test_no_checkpoint_is_sent_unasked_and_the_name_may_be_another(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    log = made(tmp_path, config("wandb.name=other words"))
    log.open(0, None)
    log.close(0, 0, {})
    assert (
        log.wandb.run.given[-1][2] is None
        and log.wandb.run.settings["labels"].name == "other words"
    )


def test_a_run_that_goes_on_keeps_its_facts_and_its_best(tmp_path: Path) -> None:
    wish = config("wandb.mode=disabled", "log.plots=false")
    first = made(tmp_path, wish)
    assert first.open(0, "kept", parameters=7) == "kept"
    first.step(row(1, 0.5))
    first.step(row(2, 9.0))
    first.close(2, 128, {})
    second = made(tmp_path, wish)
    second.open(1, None, ranks=2)
    second.step(row(2, 2.0))
    assert second.close(2, 128, {}) is None
    found = summary.read(tmp_path)
    assert (found["parameters"], found["ranks"], found["best_loss"]) == (7, 2, 0.5)
    assert [
        json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [0.5, 2.0]


def some_map() -> AttentionMap:
    return AttentionMap(
        "blocks.0.mixer.mix", torch.eye(3)[None], 1, Span.line(1, 3), Span.line(1, 3)
    )


def test_grades_reach_the_summary_a_picture_and_a_table_those_before_a_resume_too(
    tmp_path: Path,
) -> None:
    def evaluated(log: run_logger.RunLogger, step: int, accuracy: float) -> None:
        log.step(row(step, 1.0))
        log.evaluation(step, "held_out_loss", 2.0, tokens=9, by_position=BARS)
        log.evaluation(step, "accuracy", accuracy)

    first = made(tmp_path, config())
    first.open(0, None)
    evaluated(first, 1, 0.25)
    evaluated(first, 2, 0.9)
    second = made(tmp_path, config())
    second.open(1, None)
    evaluated(second, 2, 0.5)
    second.maps(2, [some_map()], 0)
    second.close(2, 128, {})
    told, images, _ = second.wandb.run.given[-1]
    assert told["held_out_accuracy"] == summary.read(tmp_path)["held_out_accuracy"] == 0.5
    assert images == ["loss.png", "loss_by_position.png", "grades.png", "attention.png"]
    assert second.wandb.run.tables == {
        "held_out_grades": [{"step": 1, "accuracy": 0.25}, {"step": 2, "accuracy": 0.5}]
    }
    assert (tmp_path / "report" / "attention.png").is_file()


def test_pictures_that_are_not_wanted_are_not_drawn_and_asked_maps_are(tmp_path: Path) -> None:
    log = made(tmp_path, config("log.plots=false"))
    log.open(0, None)
    log.step(row(1, 1.0))
    log.evaluation(1, "held_out_loss", 2.0, tokens=9, by_position=BARS)
    log.maps(1, [some_map()], 0)
    log.close(1, 64, {})
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["attention.png"]


def test_a_model_without_maps_is_said_and_the_run_goes_on(tmp_path: Path) -> None:
    screen = io.StringIO()
    log = run_logger.RunLogger(
        tmp_path,
        config("wandb.mode=disabled", "log.plots=false"),
        Console(3, file=screen),
        writes=True,
    )
    log.open(0, None)
    log.maps(3, [], 0)
    assert screen.getvalue().splitlines() == [run_logger.NO_MAPS]
    assert log.close(3, 1, {}) is None and not (tmp_path / "report" / "attention.png").exists()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = made(tmp_path, config(), writes=False)
    log.maps(1, [some_map()], 0)
    assert log.open(0, "kept", parameters=7) == "kept"
    log.step(row(1, 1.0))
    log.evaluation(1, "held_out_loss", 1.0)
    log.note(a=1)
    assert log.close(1, 64, {}) is None and list(tmp_path.iterdir()) == []


def test_a_damaged_summary_does_not_end_a_run(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{")
    summary.note(tmp_path, a=1)
    assert summary.read(tmp_path) == {"a": 1}
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        summary.read(tmp_path)
