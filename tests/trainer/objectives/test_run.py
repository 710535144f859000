"""Whole runs under an objective: on one rank, then from a checkpoint in the middle on three ranks,
with the same figures."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.pool import ranks
from trainer.export import export, reopen
from trainer.launch.elastic import RankInfo
from trainer.objectives.contradictions import vocabulary
from trainer.preflight.prepare import load_config
from trainer.run_dir import make_run_dir, record
from trainer.stages import run
from trainer.verify.whole_runs import write_documents

COMMON = (
    "data=files",
    "data.held_out=0.2",
    "context_length=97",
    "batch_tokens=388",
    "model.width=16",
    "model.layers=2",
    "model.heads=4",
    "steps=6",
    "schedule=constant",
    "schedule.warmup_steps=0",
    "optim.learning_rate=0.003",
    "precision=float64",
    "checkpoint.every=3",
    "evaluation.every=3",
    "evaluation.attention_maps=8",
    "wandb.mode=disabled",
    "log.plots=false",
)
KINDS = {
    "masked": (
        "objective=masked",
        "model=bidirectional",
        "position=t5",
        "position.bidirectional=true",
    ),
    "span": ("objective=span_corruption", "mixer=prefix", "mixer.length=0"),
}


def in_rank(env, config, directory):
    return run(
        config,
        RankInfo(env.rank, env.size, env.rank, env.size, torch.device("cpu"), "gloo"),
        Path(directory),
    )


def rows(directory, name):
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked", pytest.param("span", marks=pytest.mark.full)])
def test_a_run_and_its_resumption_on_other_ranks_have_the_same_figures(kind, tmp_path):
    write_documents(tmp_path / "text")
    words = (
        *COMMON,
        *KINDS[kind],
        f"data.path={tmp_path / 'text' / '*.txt'}",
        f"data.cache={tmp_path / 'cache'}",
    )
    one, three = tmp_path / "one", tmp_path / "three"
    make_run_dir(one)
    alone = load_config((*words, f"run_dir={one}"), started=1)
    assert ranks(1, in_rank, alone, str(one)) == [0]
    make_run_dir(three)
    spread = (
        "parallel.context=3",
        "parallel.layout=balanced",
        "parallel.micro_batch=1",
        "engine=fsdp",
    )
    resumed = (
        *words,
        *spread,
        f"resume={one / 'checkpoints' / 'step_00000003'}",
        f"run_dir={three}",
    )
    assert ranks(3, in_rank, load_config(resumed, started=3), str(three)) == [0] * 3
    whole, rest = rows(one, "metrics.jsonl"), rows(three, "metrics.jsonl")
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6] and [
        row["step"] for row in rest
    ] == [4, 5, 6]
    for a, b in zip(whole[3:], rest, strict=True):
        assert a["tokens"] == b["tokens"] and abs(a["loss"] - b["loss"]) < 1e-10 * a["loss"]
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-9 * a["grad_norm"]
    targets = whole[0]["tokens"]
    assert 0 < targets < 0.35 * 388, "tokens counts targets, and few of a row's tokens are any"
    held_out = [
        [row for row in rows(where, "evaluation.jsonl") if row["name"] == "held_out_loss"]
        for where in (one, three)
    ]
    assert abs(held_out[0][-1]["value"] - held_out[1][-1]["value"]) < 1e-10
    assert (
        held_out[0][-1]["by_position"][-1]["tokens"]
        == held_out[1][-1]["by_position"][-1]["tokens"]
        > 0
    )
    assert held_out[0][0]["tokens"] == held_out[0][1]["tokens"], (
        "every evaluation has the same targets"
    )
    config = load_config(words)
    record(one, config)  # as the command does before it starts ranks
    export(one, tmp_path / "exported")
    tokens = vocabulary(config)[0]
    assert tokens > 257 and reopen(tmp_path / "exported").head.weight.shape[0] == tokens
