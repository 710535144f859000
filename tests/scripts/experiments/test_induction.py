"""The recipe `induction` reads what runs wrote, and says the step of the jump."""

import json
from pathlib import Path

import pytest

from scripts.experiments import induction
from scripts.experiments.runner import Budget
from trainer.config.build_model import build_model
from trainer.preflight.prepare import load_config

SCORES = {1: [0.03, 0.05, 0.04], 2: [0.03, 0.71, 0.8]}


def write(folder: Path, layers: int) -> Path:
    """Writes the evaluations of a run, among others that are no figures of induction."""
    directory = folder / str(layers)
    directory.mkdir()
    rows = [{"step": 50, "name": "held_out_loss", "value": 2.0}]
    for number, score in enumerate(SCORES[layers], 1):
        for name, value in (("score", score), ("accuracy", score / 2), ("ablated", 0.02)):
            rows.append({"step": 50 * number, "name": f"induction/{name}", "value": value})
    lines = [json.dumps(row) for row in rows]
    (directory / "evaluation.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def test_the_table_says_where_the_score_jumps(tmp_path, monkeypatch) -> None:
    def train(folder: Path, layers: int, seed: int, steps: int | None) -> induction.InductionRun:
        if seed == 1 and layers == 1:
            return induction.InductionRun(layers, seed, {}, fault="exit status 2: no")
        return induction.InductionRun(layers, seed, induction.curves_of(tmp_path / str(layers)))

    for layers in SCORES:
        write(tmp_path, layers)
    monkeypatch.setattr(induction, "train", train)
    said: list[str] = []
    text, trials = induction.induction(Budget(seeds=2, jobs=2), said.append)
    rows = [line for line in text.splitlines() if "layer" in line]
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[-3:]] == [
        ["one layer", "0", "never", "0.040", "0.020", "0.020"],
        ["two layers", "0", "100", "0.800", "0.400", "0.020"],
        ["two layers", "1", "100", "0.800", "0.400", "0.020"],
    ]
    assert len(said) == 4
    assert [trial.fault for trial in trials] == [None, "exit status 2: no", None, None]


@pytest.mark.parametrize("layers", [1, 2])
def test_the_experiment_is_attention_alone(layers) -> None:
    config = load_config(["experiment=induction", f"model.layers={layers}"])
    model = build_model(config, 65)
    kinds = {type(module).__name__ for module in model.modules()}
    assert "SwiGLU" not in kinds and "NoFeedForward" in kinds
    assert len(model.blocks) == layers
