"""Whole runs under DeepSpeed: what it cannot honour is refused by name, and its checkpoints are
everybody's."""

import os
import shutil

import pytest

from tests.trainer.verify.test_whole_runs import in_pool
from trainer.config.compose import compose
from trainer.logs.jsonl import METRICS, read
from trainer.preflight.check import check_config
from trainer.verify.whole_runs import COMMON, ranks_of, write_documents

DEEPSPEED = "engine=deepspeed"


def faults(*words):
    asked = compose((DEEPSPEED, "wandb.mode=disabled", *words))
    assert asked.config is not None
    return check_config(asked.config, asked.given, asked.mended, asked.faults)


REFUSED = [
    (("precision=float64",), ["precision=float64", "engine=fsdp"]),
    (
        ("precision=bfloat16", "engine.zero_stage=0"),
        ["engine.zero_stage=0", "precision=bfloat16", "engine.zero_stage=1"],
    ),
    (("engine.offload=optimizer",), ["engine.offload=optimizer", "engine.offload=none"]),
    (
        ("model=switch", "parallel.experts=2", "parallel.data=2"),
        ["parallel.experts=2", "engine=deepspeed", "engine=fsdp"],
    ),
    (
        ("engine.zero_stage=3", "engine.compile=true"),
        ["engine.compile=true", "engine.zero_stage=3", "engine.zero_stage=2"],
    ),
    (("engine.reshard_after_forward=true",), ["engine.reshard_after_forward=true", "engine=fsdp"]),
    (("model=lstm", "engine.zero_stage=3"), ["engine.zero_stage=3", "engine.zero_stage=1"]),
    (
        ("model=lstm", "engine.zero_stage=2", "parallel.context=2"),
        ["engine.zero_stage=2", "engine.zero_stage=1"],
    ),
]


@pytest.mark.parametrize("words, said", REFUSED)
def test_what_deepspeed_cannot_honour_is_refused_with_a_way_out(words, said):
    assert any(all(word in fault for word in said) for fault in faults(*words)), faults(*words)


FINE = [
    (),
    ("engine.zero_stage=0",),
    ("precision=bfloat16", "engine.zero_stage=1"),
    ("model=switch", "engine.zero_stage=3"),
    ("model=lstm",),
]


@pytest.mark.parametrize(
    "words", [*FINE, ("model=lstm", "engine.zero_stage=1", "parallel.context=2")]
)
def test_what_it_can_is_not(words):
    assert faults(*words) == []


def losses(directory):
    return {row["step"]: row["loss"] for row in read(directory / METRICS)}


@pytest.mark.full
@pytest.mark.slow
def test_runs_go_on_from_single_under_deepspeed_and_back(tmp_path):
    os.environ["HF_HUB_OFFLINE"] = "1"
    data = (
        "data=files",
        f"data.path={write_documents(tmp_path / 'text')}",
        f"data.cache={tmp_path / 'cache'}",
    )
    words = (
        *COMMON,
        *data,
        "precision=float32",
        "steps=6",
        "checkpoint.every=3",
        "checkpoint.keep=2",
    )
    ways = {
        "alone": ("engine=single",),
        "shared": (DEEPSPEED, "engine.zero_stage=3", "parallel.context=2"),
    }
    after = {
        "alone": (DEEPSPEED, "engine.zero_stage=1", "parallel.data=2"),
        "shared": ("engine=single",),
    }
    for name, how in ways.items():
        in_pool((*words, *how, f"run_dir={tmp_path / name}"), ranks_of(how), tmp_path / name)
    whole = losses(tmp_path / "alone")
    for name, how in after.items():
        shutil.rmtree(tmp_path / name / "checkpoints" / "step_00000006")
        in_pool((*words, *how, f"run_dir={tmp_path / name}"), ranks_of(how), tmp_path / name)
        again = losses(tmp_path / name)
        assert list(again) == list(whole) == [1, 2, 3, 4, 5, 6]
        assert all(abs(again[step] - loss) < 1e-5 * loss for step, loss in whole.items()), (
            name,
            again,
            whole,
        )
        assert name == "shared" or again != whole  # the steps were taken again, by other ranks
