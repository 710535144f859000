"""Plans of a step are made on the prefetch thread, whatever the mixer and driver."""

import threading
from unittest import mock

import pytest

from models.span import DerivedCache
from parallel.drivers import key_exchange
from tests.support.pool import ranks
from tests.trainer.verify.test_whole_runs import in_rank
from trainer.logs.jsonl import METRICS, read
from trainer.loop import Loop
from trainer.run_dir import make_run_dir
from trainer.verify.whole_runs import write_documents

COMMON = (
    "steps=5",
    "context_length=96",
    "batch_tokens=192",
    "model.width=16",
    "model.layers=2",
    "wandb.mode=disabled",
    "log.plots=false",
    "log.every=1",
    "evaluation.every=0",
    "checkpoint.every=0",
    "parallel.micro_batch=1",
    "engine=single",
    "data=files",
)
PLANS = {"tiles", "stacked tiles", "bands", "stretches", "chunks", "pieces", "passing"}
PLANS |= {"halo", "tally", "pick", "relay", "hand on", "part"}


def watched(env, words, directory):
    """Takes a run; returns the plans that its steps made themselves, as (step, name)."""
    made, now = [], {"step": 0}
    get, gather, step = DerivedCache.get, key_exchange._exchange, Loop.take_step

    def note(name):
        if threading.current_thread() is threading.main_thread() and now["step"]:
            made.append((now["step"], name))

    def watched_get(self, key, build, *sources):
        name = key[0] if isinstance(key, tuple) else key

        def noted():
            if name in PLANS:
                note(name)
            return build()

        return get(self, key, noted, *sources)

    def watched_gather(*args):
        note("gather")
        return gather(*args)

    def watched_step(self, progress, given):
        now["step"] = progress.step + 1
        step(self, progress, given)
        now["step"] = 0

    with (
        mock.patch.object(DerivedCache, "get", watched_get),
        mock.patch.object(key_exchange, "_exchange", watched_gather),
        mock.patch.object(Loop, "take_step", watched_step),
    ):
        assert in_rank(env, words, directory) == 0
    return made


def went(folder, name, size, words):
    directory = folder / name
    make_run_dir(directory)
    made = ranks(size, watched, (*COMMON, *words, f"run_dir={directory}"), str(directory))
    return made, [(row["loss"], row["grad_norm"]) for row in read(directory / METRICS)]


HEADS = "model.heads=2"
CASES = {
    "fetched keys": ("parallel.method=allgather", "model=sliding", HEADS),
    "scans": ("model=gated_delta", HEADS),
    "chosen entries": ("model=compressed", HEADS),
    "relays": ("model=lstm",),
    "heads": ("parallel.method=ulysses", HEADS),
    "long convolutions": ("model=hyena",),
}
FULL = {"heads", "long convolutions"}


def noted_first(made):
    """Whether a rank planned in the first step, which is noted, and in none behind the second,
    whose input may be read before."""
    return {1} <= {step for step, _ in made} <= {1, 2}


@pytest.fixture
def data(tmp_path):
    return f"data.path={write_documents(tmp_path / 'text')}", f"data.cache={tmp_path / 'cache'}"


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.full] * (case in FULL)) for case in CASES]
)
def test_the_thread_makes_what_a_step_plans(case, data, tmp_path):
    every, _ = went(tmp_path, "ahead", 2, (*data, *CASES[case], "parallel.context=2"))
    for made in every:
        assert noted_first(made)


def test_a_run_with_plans_made_ahead_is_the_run_without(data, tmp_path):
    words = (*data, "parallel.method=ring", HEADS, "parallel.context=2")
    ahead, losses = went(tmp_path, "ahead", 2, words)
    here, same_losses = went(tmp_path, "here", 2, (*words, "prefetch=0"))
    assert losses == same_losses and len(losses) == 5
    assert {step for made in here for step, _ in made} == {1, 2, 3, 4, 5}
    assert all(noted_first(made) for made in ahead)
