"""Pictures of named evaluations: one for each with cells, in a run and in a report of variants."""

import json

import pytest

from trainer.logs.evaluation_plots import _grid, evaluation_figures, kind_of, place_of
from trainer.logs.plots import grades, plots
from trainer.reports.evaluation_plots import draw_evaluations, mean_cells
from trainer.reports.runs import RunRecord
from trainer.reports.variants import Variant

DEPTHS = [
    {"length": length, "depth": depth, "accuracy": depth, "exact": 0.0, "loss": 1.0, "examples": 2}
    for length in (64, 128)
    for depth in (0.0, 0.5, 1.0)
]
LENGTHS = [
    {"length": 8, "accuracy": 0.5, "loss": 1.0},
    {"length": 16, "accuracy": 0.25, "loss": 2.0},
]
POSITIONS = [{"begin": 0, "end": 8, "loss": 3.0, "tokens": 4}]
HEADS = [
    {"layer": f"blocks.{layer}.mixer.mix", "head": head, "induction": 0.3 * head, "entropy": 1.0}
    for layer in range(2)
    for head in range(3)
]


def row(step, name, value, cells=(), **more):
    part = name.partition("/")[0]
    return {"step": step, "name": name, "value": value, "part": part, "cells": cells, **more}


@pytest.fixture
def directory(tmp_path):
    rows = [
        {"step": 1, "name": "accuracy", "value": 0.5},
        row(1, "needle/accuracy", 0.4, DEPTHS),
        row(1, "recall/accuracy", 0.4, LENGTHS),
        row(1, "by_position/loss", 3.0, POSITIONS),
        row(1, "induction/score", 0.2, HEADS),
        row(2, "induction/score", 0.8, HEADS),
        row(2, "induction/accuracy", 0.9),
    ]
    (tmp_path / "evaluation.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


def test_every_evaluation_with_cells_has_its_picture(directory):
    names = [path.name for path in plots(directory)]
    assert names == [
        "grades.png",
        "needle_accuracy.png",
        "recall_accuracy.png",
        "by_position_loss.png",
        "induction_score.png",
        "induction_over_steps.png",
    ]
    assert all((directory / "report" / name).stat().st_size > 5000 for name in names)
    figures = dict(evaluation_figures(directory, "run"))
    [note] = figures["induction_over_steps"].axes[0].texts
    assert note.get_text() == "0.5 at step 2"
    panel = figures["needle_accuracy"].axes[0]
    assert panel.images[0].get_array().shape == (3, 2)
    assert [text.get_text() for text in panel.texts][:2] == ["0.00", "0.00"]


def test_grades_of_the_held_out_data_are_not_mixed_with_named_figures(directory):
    assert grades(directory) == [{"step": 1, "accuracy": 0.5}]


def test_cells_say_which_picture_they_are():
    assert [kind_of(cells) for cells in (DEPTHS, LENGTHS, POSITIONS, HEADS)] == [
        "depths",
        "lines",
        "positions",
        "heads",
    ]
    assert kind_of([{"task": "vt", "accuracy": 1.0}]) is None
    assert place_of([{"task": "vt", "length": 64, "accuracy": 1.0}]) == "length"
    values, down, across = _grid(DEPTHS, "depth", "length", "accuracy")
    assert down == [0.0, 0.5, 1.0] and across == [64, 128] and values[2, 1] == 1.0


def test_a_report_draws_variants_beside_each_other_with_means_over_seeds(tmp_path):
    def run(seed):
        cells = [dict(cell, accuracy=cell["accuracy"] * seed) for cell in DEPTHS]
        return RunRecord(f"run{seed}", finished=True, cells={"needle/accuracy": cells})

    (tmp_path / "report").mkdir()
    variants = [Variant("full", (run(1), run(0))), Variant("sliding", (run(1),))]
    paths = draw_evaluations(variants, tmp_path / "report")
    assert list(paths) == ["needle/accuracy"]
    assert paths["needle/accuracy"].name == "evaluation_needle_accuracy.png"
    means = mean_cells([run(1).cells["needle/accuracy"], run(0).cells["needle/accuracy"]])
    assert [cell["accuracy"] for cell in means[:3]] == [0.0, 0.25, 0.5]
    assert means[0]["length"] == 64
