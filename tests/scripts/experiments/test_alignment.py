"""The recipe `alignment`: its arms, the layer that it aligns, its tables, and one arm for real."""

import pytest

from scripts.experiments import alignment
from scripts.experiments.runner import Budget
from scripts.experiments.trial import HELD_OUT, Trial, TrialResult, run_trial
from trainer.evaluation.held_out import HeldOutResult

SMALL = (
    "model.width=16",
    "model.layers=2",
    "batch_tokens=180",
    "steps=2",
    "evaluation.batches=1",
)


def test_the_layer_that_refuses_text_is_aligned_by_itself(monkeypatch):
    asked = []

    def pretend(jobs, effort, say):
        results = []
        for trial, seed in jobs:
            asked.append(trial)
            graded = {"layer": 2.0 if seed else 1.0, "image_refusal": 0.25, "consistency": 0.5}
            exam = HeldOutResult(1.0, 1, [], graded)
            results.append(TrialResult(trial.name, seed, {HELD_OUT: exam}))
        return results

    monkeypatch.setattr(alignment, "run_trials", pretend)
    text, results = alignment.alignment(Budget(seeds=3), print)
    assert len(results) == (2 + 2 + 3 + 3) * 3
    arms = {trial.name: trial.overrides for trial in asked}
    assert "model.alignment_layers=[2]" in arms["with states aligned at layer 2"]
    assert text.count("| with both") == 2 * 2 and "0.250 (0.250 to 0.250)" in text
    asked.clear()
    text, results = alignment.alignment(Budget(seeds=1, only="sound"), print)
    assert len(results) == 2 and text.count("| with both") == 2
    assert all("data.modalities=[text,sound]" in trial.overrides for trial in asked)
    failed = [TrialResult("none", 0, fault="it fell")]
    assert alignment.refusing_layer(failed) == 1


@pytest.mark.slow
def test_an_arm_gives_every_figure_of_both_tables():
    words = (*alignment.COMMON, *SMALL, "data.modalities=[text,image]")
    result = run_trial(Trial("one", words), seed=0)
    graded = result.exams[HELD_OUT].graded
    for name in (*alignment.FIGURES.values(), *alignment.PROBE_FIGURES.values()):
        assert name.format("image") in graded, name
    assert result.rows[-1].statistics is not None
    assert {"text", "rendering", "consistency", "alignment"} <= set(result.rows[-1].statistics)
