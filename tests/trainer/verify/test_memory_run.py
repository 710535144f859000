"""A run with a memory: the same losses on any ranks, and a resumed run goes on with what its lanes
carried."""

import json
import os

import pytest

from tests.trainer.verify.test_whole_runs import in_pool
from trainer.logs.jsonl import METRICS
from trainer.verify.whole_runs import write_documents

COMMON = (
    "steps=6",
    "context_length=48",
    "batch_tokens=192",
    "model.width=32",
    "model.layers=2",
    "model.heads=4",
    "optim.learning_rate=0.003",
    "checkpoint.every=3",
    "evaluation.every=3",
    "evaluation.batches=2",
    "wandb.mode=disabled",
    "log.plots=false",
    "precision=float64",
)
MEMORIES = {
    "segments": (
        "memory=segments",
        "model.kv_heads=2",
        "memory.length=40",
        "memory.segment=16",
        "position=relative",
    ),
    "tokens": ("memory=tokens", "memory.length=3", "memory.segment=16", "memory.depth=2"),
    "lookup": (
        "memory=lookup",
        "memory.length=60",
        "memory.segment=16",
        "memory.count=5",
        "memory.layers=[1]",
    ),
    "compressive": ("memory=compressive", "memory.segment=16", "memory.rule=delta"),
    "states": ("memory=segments", "memory.length=0", "mixer=gated_delta"),
}


def losses(directory, name, key):
    return [json.loads(line)[key] for line in (directory / name).read_text().splitlines()]


@pytest.mark.full
@pytest.mark.parametrize(
    "memory",
    MEMORIES,
)
def test_a_memory_gives_the_same_losses_on_any_ranks_and_after_a_resume_on_others(memory, tmp_path):
    os.environ["HF_HUB_OFFLINE"] = "1"
    data = (
        "data=files",
        f"data.path={write_documents(tmp_path / 'text')}",
        f"data.cache={tmp_path / 'cache'}",
    )
    words = (*COMMON, *data, *MEMORIES[memory])

    def went(name, *cases):
        directory = tmp_path / name
        for size, case in cases:
            in_pool((*words, *case, f"run_dir={directory}"), size, directory)
        return losses(directory, METRICS, "loss"), losses(directory, "evaluation.jsonl", "value")

    truth = went("truth", (1, ("engine=single",)))
    forgot = (*COMMON, *data, "position=relative") if memory == "segments" else (*COMMON, *data)
    in_pool((*forgot, "engine=single", f"run_dir={tmp_path / 'without'}"), 1, tmp_path / "without")
    assert truth[0][1:] != losses(tmp_path / "without", METRICS, "loss")[1:]
    for name, *cases in (
        ("shared", (3, ("engine=fsdp", "parallel.context=3"))),
        (
            "resumed",
            (4, ("steps=3", "parallel.context=2", "parallel.data=2", "engine=single")),
            (3, ("parallel.context=3",)),
        ),
        (
            "rows",
            (2, ("steps=3", "parallel.data=2", "parallel.micro_batch=1")),
            (1, ("engine=single",)),
        ),
    ):
        for got, want in zip(went(name, *cases), truth):
            assert got == pytest.approx(want, rel=1e-9), name
