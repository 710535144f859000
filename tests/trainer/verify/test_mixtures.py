"""Whole runs of models with experts: the same losses, own losses and figures however they are
spread; the log has them all."""

from pathlib import Path

import pytest
import torch

from tests.support.pool import ranks
from tests.trainer.verify.test_doctor import examine
from trainer.launch.elastic import RankInfo
from trainer.logs.jsonl import METRICS, read
from trainer.preflight.prepare import load_config
from trainer.run_dir import make_run_dir
from trainer.stages import run
from trainer.verify.whole_runs import write_documents

COMMON = (
    "steps=4",
    "context_length=126",
    "batch_tokens=504",
    "model.width=16",
    "model.layers=2",
    "model.heads=2",
    "data=files",
    "checkpoint.every=0",
    "evaluation.every=0",
    "schedule.warmup_steps=1",
    "wandb.mode=disabled",
    "log.plots=false",
    "precision=float64",
    "optim.learning_rate=0.02",
    "engine=single",
)
SPREAD = (
    ("parallel.data=2", "parallel.experts=2", "parallel.micro_batch=1"),
    ("parallel.context=2", "parallel.data=2", "parallel.experts=4", "engine=fsdp"),
    ("parallel.context=3", "engine=fsdp", "engine.checkpointing=full"),
)
MODELS = {
    "switch": ("model=switch", "model.feedforwards.switch.expert_dropout=0.2"),
    "moe_topk": (
        "model=moe_topk",
        "model.feedforwards.experts.bias_speed=0.05",
        "model.feedforwards.experts.balance=0.1",
    ),
}

FULL = pytest.mark.full
# `make test` runs the one model from the start, the other from checkpoints.
ONE = ("switch", pytest.param("moe_topk", marks=FULL))
OTHER = ("moe_topk", pytest.param("switch", marks=FULL))


def in_rank(env, config, directory):
    return run(
        config,
        RankInfo(env.rank, env.size, env.rank, env.size, torch.device("cpu"), "gloo"),
        Path(directory),
    )


def rows_of(words, directory):
    words = (*COMMON, *words, f"run_dir={directory}")
    sizes = dict(word.split("=", 1) for word in words)
    size = int(sizes.get("parallel.context", 1)) * int(sizes.get("parallel.data", 1))
    make_run_dir(directory)
    config = load_config(words, started=size)
    assert ranks(size, in_rank, config, str(directory)) == [0] * size
    return list(read(directory / METRICS))


@pytest.mark.parametrize("name", ONE)
def test_a_run_is_the_same_however_tokens_and_experts_are_spread(name, tmp_path):
    data = (
        f"data.path={write_documents(tmp_path / 'text')}",
        f"data.cache={tmp_path / 'cache'}",
        *MODELS[name],
    )
    truth = rows_of(data, tmp_path / "alone")
    assert truth[-1]["loss"] < truth[0]["loss"]
    assert {"load", "dropped", "entropy", "blocks.1.feedforward/load"} <= truth[0][
        "statistics"
    ].keys()
    assert truth[0]["statistics"]["balance"] == pytest.approx(
        truth[0]["statistics"]["blocks.1.feedforward/balance"]
    )
    weight = {"switch": 0.01, "moe_topk": 0.1}[name]
    assert truth[0]["auxiliary"]["balance"] == pytest.approx(
        weight * truth[0]["statistics"]["balance"]
    )  # a mean over rows
    if name == "switch":
        assert 0.05 < truth[0]["statistics"]["dropped"] < 0.9
    for number, words in enumerate(SPREAD):
        found = rows_of((*data, *words), tmp_path / str(number))
        for a, b in zip(truth, found, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-10), words
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-10), words
            for part in ("auxiliary", "statistics"):
                assert b[part] == pytest.approx(a[part], rel=1e-10), words


@pytest.mark.full
@pytest.mark.parametrize("name", ONE)
def test_a_run_with_a_memory_that_hands_segments_on_is_the_same_over_ranks(name, tmp_path):
    data = (
        f"data.path={write_documents(tmp_path / 'text')}",
        f"data.cache={tmp_path / 'cache'}",
        *MODELS[name],
    )
    memory = ("memory=tokens", "memory.length=3", "memory.segment=17")
    truth = rows_of((*data, *memory), tmp_path / "alone")
    spreads = (
        ("parallel.context=3", "memory.recompute=true"),
        ("parallel.context=2", "parallel.data=2"),
    )
    for number, words in enumerate(spreads):
        for a, b in zip(
            truth, rows_of((*data, *memory, *words), tmp_path / str(number)), strict=True
        ):
            assert (b["loss"], b["grad_norm"]) == pytest.approx(
                (a["loss"], a["grad_norm"]), rel=1e-10
            )
            assert b["auxiliary"] == pytest.approx(a["auxiliary"], rel=1e-10)
            assert b["statistics"] == pytest.approx(a["statistics"], rel=1e-10)


@pytest.mark.full
@pytest.mark.parametrize("name", OTHER)
def test_a_checkpoint_of_four_expert_ranks_goes_on_on_one_and_two_and_back(name, tmp_path):
    """The bias of the choice, too, is what it was."""
    data = (
        f"data.path={write_documents(tmp_path / 'text')}",
        f"data.cache={tmp_path / 'cache'}",
        *MODELS[name],
    )
    data = (
        *data,
        "optim.learning_rate=0.001",
    )  # so that the bias, and not the router, makes the choice
    saving = (*data, "checkpoint.every=2", "checkpoint.keep=2")
    four = ("parallel.context=2", "parallel.data=2", "parallel.experts=4", "engine=fsdp")
    two = ("parallel.data=2", "parallel.experts=2")
    sources = {four: tmp_path / "of four", (): tmp_path / "of one"}
    truth = {words: rows_of((*saving, *words), place) for words, place in sources.items()}[()]
    for number, (source, words) in enumerate(((four, ()), (four, two), ((), four))):
        going_on = f"resume={sources[source] / 'checkpoints' / 'step_00000002'}"
        found = rows_of((*data, *words, going_on), tmp_path / str(number))
        assert [row["step"] for row in found] == [3, 4]
        for a, b in zip(truth[2:], found, strict=True):
            assert (b["loss"], b["grad_norm"]) == pytest.approx(
                (a["loss"], a["grad_norm"]), rel=1e-10
            )
            assert b["statistics"] == pytest.approx(a["statistics"], rel=1e-10)


def test_the_doctor_finds_no_coupling_of_documents_unless_they_queue_up_together():
    sound, coupled = (
        ranks(
            3, examine, ("model=switch", f"model.feedforwards.switch.capacity_over={over}"), None
        )[0]
        for over in ("document", "row")
    )
    assert [f for f in sound if not f.passed] == []
    assert {f.check for f in coupled if not f.passed} == {"documents"}
