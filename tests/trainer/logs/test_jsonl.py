"""Rows survive kills, and a resumed run cuts what comes after its checkpoint."""

import json
from pathlib import Path

import pytest

from trainer.logs.jsonl import Evaluations, Metrics, MetricsRow, read

FIELDS = [
    "step",
    "loss",
    "tokens",
    "tokens_per_second",
    "step_seconds",
    "grad_norm",
    "learning_rate",
]
FIELDS += ["peak_memory_bytes", "mfu"]


def row(step: int, loss: float = 1.0) -> MetricsRow:
    return MetricsRow(step, loss, 8 * step, 100.0, 0.5, 1.0, 1e-3, 10**6, None)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_row_is_on_the_disk_at_once_with_exactly_the_agreed_fields(tmp_path):
    metrics = Metrics(tmp_path / "run")
    metrics.add(row(1, loss=float("nan")))
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text.endswith("\n") and list(json.loads(text)) == FIELDS
    assert json.loads(text)["loss"] is None
    Evaluations(tmp_path).add(
        1, "held_out", 2.0, by_position=[{"begin": 0, "end": 1, "loss": float("inf")}]
    )
    assert list(read(tmp_path / "evaluation.jsonl")) == [
        {
            "step": 1,
            "name": "held_out",
            "value": 2.0,
            "by_position": [{"begin": 0, "end": 1, "loss": None}],
        }
    ]


def test_what_layers_tell_stands_in_the_row_where_they_tell_something(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.add(
        row(1)._replace(
            auxiliary={"balance": 0.1}, statistics={"load": 1.5, "blocks.1.feedforward/load": 1.5}
        )
    )
    (found,) = read(metrics.path)
    assert list(found) == [*FIELDS, "auxiliary", "statistics"]
    assert found["statistics"] == {"load": 1.5, "blocks.1.feedforward/load": 1.5}


def test_rows_after_a_step_are_cut_and_writing_goes_on(tmp_path):
    metrics = Metrics(tmp_path)
    for step in (1, 2, 3, 4):
        metrics.add(row(step))
    assert metrics.truncate_after(2) == 2
    metrics.add(row(3))
    assert metrics.truncate_after(9) == 0
    assert steps(metrics.path) == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    metrics.close()
    metrics.close()


def test_a_half_written_last_line_is_dropped_on_opening(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for half in ('{"step": 2, "lo', '{"step": 2}', "\x00\x00"):
        path.write_text('{"step": 1}\n' + half)
        assert [one["step"] for one in read(path)] == [1]
        metrics = Metrics(tmp_path)
        metrics.add(row(2))
        assert steps(path) == [1, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl"):
        list(read(path))
    assert list(read(tmp_path / "absent.jsonl")) == []
