"""The recipe of experts: models that cost alike, and tables of what their logs and exams say."""

from scripts.experiments import experts
from scripts.experiments.runner import Budget
from scripts.experiments.trial import HELD_OUT, TrialResult
from trainer.evaluation.held_out import HeldOutResult
from trainer.logs.jsonl import MetricsRow
from trainer.preflight.prepare import load_config
from trainer.preflight.reach import fitting


def taught(jobs, effort, say):
    """Lessons whose load falls from 4 to 1 over ten steps, and whose loss is the seed."""
    found = []
    for lesson, seed in jobs:
        figures = [{"load": 4 - step / 3, "dropped": step / 100} for step in range(10)]
        rows = [
            MetricsRow(
                step + 1,
                1.0,
                1,
                1.0,
                1.0,
                1.0,
                0.1,
                1,
                None,
                statistics=None if lesson.name == "dense" else each,
            )
            for step, each in enumerate(figures)
        ]
        found.append(
            TrialResult(
                lesson.name, seed, {HELD_OUT: HeldOutResult(float(seed), 1, [])}, rows, 2.0, 1000
            )
        )
    return found


def test_its_tables_say_what_the_lessons_gave(monkeypatch):
    monkeypatch.setattr(experts, "run_trials", taught)
    text, learned = experts.experts(Budget(seeds=3), print)
    assert len(learned) == 3 * len(experts.MODELS)
    load, dropped, worth = (part.split("\n") for part in text.split("###")[1:])
    assert any(
        line.startswith("| switch | 4.000 (4.000 to 4.000) | 2.667") and "| 1.000 (" in line
        for line in load
    )
    assert any(
        line.startswith("| switch, no balancing loss | 0.000") and "| 0.090 (" in line
        for line in dropped
    )
    assert not any(line.startswith("| dense") for line in [*load, *dropped])
    assert any(line.startswith("| dense | 1.000 (0.000 to 2.000) | 1,000 |") for line in worth)


def test_a_token_costs_the_same_in_all_its_models_up_to_the_routers():
    costs = {name: experts._flops(words) for name, words in experts.MODELS.items()}
    assert all(costs["dense"] <= cost < 1.02 * costs["dense"] for cost in costs.values()), costs


def test_its_settings_can_be_honoured():
    for words in experts.MODELS.values():
        assert load_config(fitting((*words, *experts.SIZES, *experts.TEXT))).steps == 400
