"""The pictures of a run: which are drawn, and that their curves are the rows."""

import json
from pathlib import Path

import pytest
import torch

from models.analysis.attention_maps import AttentionMap
from models.span import Span
from trainer.logs import plots


def write(directory: Path, steps: int, evaluations: int) -> None:
    directory.mkdir()
    rows = [{"step": s, "loss": 1 + 1 / s, "tokens": 64 * s} for s in range(1, steps + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bars = [{"begin": 2**b // 2, "end": 2**b, "loss": 3.0 - b / 4} for b in range(5)]
    rows = [
        {"step": 10 * e, "name": "held_out", "value": 2.0, "by_position": bars}
        for e in range(1, evaluations + 1)
    ]
    (directory / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, by file name."""
    kept, save = {}, plots._save
    monkeypatch.setattr(
        plots,
        "_save",
        lambda figure, path: kept.setdefault(path.name, figure) and save(figure, path),
    )
    return kept


def test_both_pictures_are_drawn_from_the_rows(tmp_path, figures):
    write(tmp_path / "my_run", steps=120, evaluations=3)
    made = plots.plots(tmp_path / "my_run")
    assert [path.name for path in made] == ["loss.png", "loss_by_position.png"]
    assert all(
        path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000 for path in made
    )
    axes = figures["loss.png"].axes[0]
    raw, smooth, held_out = axes.get_lines()
    assert list(raw.get_xdata()) == list(range(1, 121))
    assert list(raw.get_ydata()) == [1 + 1 / s for s in range(1, 121)]
    assert smooth.get_ydata()[60] == pytest.approx(sum(1 + 1 / s for s in range(59, 64)) / 5)
    assert list(held_out.get_xdata()) == [10, 20, 30]
    assert "my_run" in axes.get_title(loc="left")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss (nats per token)")
    by_position = figures["loss_by_position.png"].axes[0]
    assert [line.get_label() for line in by_position.get_lines()] == [
        "step 10",
        "step 20",
        "step 30",
    ]
    assert list(by_position.get_lines()[-1].get_ydata()) == [3.0, 2.75, 2.5, 2.25, 2.0]


def test_a_run_of_one_step_without_evaluation_has_one_picture(tmp_path):
    write(tmp_path / "one", steps=1, evaluations=0)
    assert [path.name for path in plots.plots(tmp_path / "one")] == ["loss.png"]
    (tmp_path / "none").mkdir()
    assert plots.plots(tmp_path / "none") == []


def test_smoothing_keeps_a_straight_line_where_it_is():
    line = [float(value) for value in range(10)]
    assert plots._smooth(line, 3) == pytest.approx(line)


def test_grades_of_a_task_are_a_table_and_a_picture(tmp_path, figures):
    write(tmp_path / "run", steps=3, evaluations=2)
    with open(tmp_path / "run" / "evaluation.jsonl", "a") as file:
        for step, right, wrong in ((10, 0.25, 0.5), (20, 0.75, None)):
            file.write(json.dumps({"step": step, "name": "accuracy", "value": right}) + "\n")
            file.write(json.dumps({"step": step, "name": "wrong_bits", "value": wrong}) + "\n")
    want = [{"step": 10, "accuracy": 0.25, "wrong_bits": 0.5}, {"step": 20, "accuracy": 0.75}]
    assert plots.grades(tmp_path / "run") == want
    assert [path.name for path in plots.plots(tmp_path / "run")] == [
        "loss.png",
        "loss_by_position.png",
        "grades.png",
    ]
    accuracy, wrong = figures["grades.png"].axes[0].get_lines()
    assert [list(accuracy.get_xdata()), list(accuracy.get_ydata())] == [[10, 20], [0.25, 0.75]]
    assert (accuracy.get_label(), wrong.get_label(), list(wrong.get_ydata())) == (
        "accuracy",
        "wrong_bits",
        [0.5],
    )


def test_attention_has_a_row_for_each_softmax_and_a_picture_for_each_head(tmp_path, figures):
    weight = torch.rand(2, 5, 5).tril()
    wider = torch.cat([torch.rand(1, 5, 5), torch.zeros(1, 5, 3)], 2)
    maps = [
        AttentionMap("blocks.0.mixer.mix", weight, 9, Span.line(1, 5), Span.line(1, 5)),
        AttentionMap("blocks.4.mixer.mix", wider, 1, Span.line(1, 5), Span.line(1, 8)),
    ]
    path = plots.attention(maps, tmp_path, "mine: attention at step 7", left_out=3)
    assert path == tmp_path / "report" / "attention.png" and path.read_bytes()[:4] == b"\x89PNG"
    figure = figures["attention.png"]
    drawn = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in drawn] == ["head 0", "head 1", "head 0"]
    assert [axes.get_ylabel() for axes in drawn] == ["blocks.0.mixer.mix", "", "blocks.4.mixer.mix"]
    for axes, want in zip(drawn, (weight[0], weight[1], wider[0])):
        shown = axes.images[0].get_array()
        assert (shown.mask == (want == 0).numpy()).all() and (shown.filled(0) == want.numpy()).all()
    assert "attention at step 7" in figure.get_suptitle()
    assert "3 more softmaxes" in figure.get_suptitle() and "7 more heads" in figure.get_suptitle()
