"""Whole runs with attention in groups of heads: the figures of a run with all heads at once."""

import pytest

from tests.support.pool import ranks
from tests.trainer.objectives.test_run import COMMON, in_rank, rows
from trainer.preflight.prepare import load_config
from trainer.run_dir import make_run_dir
from trainer.verify.whole_runs import write_documents

GROUPS = ("engine.head_groups=2", "engine.checkpointing=full")
SPREAD = ("parallel.context=3", "parallel.micro_batch=1", "engine=fsdp")


def trained(directory, size, *words):
    """(figures of steps, figures of evaluations) of a run in a new directory."""
    make_run_dir(directory)
    config = load_config((*words, f"run_dir={directory}"), started=size)
    assert ranks(size, in_rank, config, str(directory)) == [0] * size
    return rows(directory, "metrics.jsonl"), rows(directory, "evaluation.jsonl")


def held_out(evaluations):
    return {row["step"]: row["value"] for row in evaluations if row["name"] == "held_out_loss"}


@pytest.mark.slow
def test_runs_in_groups_of_heads_have_the_figures_of_all_heads_and_are_resumed_as_others(tmp_path):
    write_documents(tmp_path / "text")
    text = f"data.path={tmp_path / 'text' / '*.txt'}", f"data.cache={tmp_path / 'cache'}"
    words = (*COMMON, "model.kv_heads=2", *text)
    whole, evaluated = trained(tmp_path / "whole", 1, *words)
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]
    middle = f"resume={tmp_path / 'whole' / 'checkpoints' / 'step_00000003'}"
    for place, size, more in (("alone", 1, ()), ("spread", 3, SPREAD)):
        grouped, judged = trained(tmp_path / place, size, *words, *GROUPS, *more, middle)
        assert [row["step"] for row in grouped] == [4, 5, 6]
        for a, b in zip(whole[3:], grouped, strict=True):
            assert abs(a["loss"] - b["loss"]) < 1e-10 * a["loss"]
            assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-9 * a["grad_norm"]
        assert held_out(judged)[6] == pytest.approx(held_out(evaluated)[6], rel=1e-10)
    back = f"resume={tmp_path / 'spread' / 'checkpoints' / 'step_00000006'}", "steps=7"
    (ungrouped,), _ = trained(tmp_path / "back", 1, *words, *back)
    again = f"resume={tmp_path / 'whole' / 'checkpoints' / 'step_00000006'}", "steps=7"
    (expected,), _ = trained(tmp_path / "again", 1, *words, *again)
    assert ungrouped["loss"] == pytest.approx(expected["loss"], rel=1e-10)
