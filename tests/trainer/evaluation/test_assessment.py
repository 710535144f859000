"""Evaluations: saved before, owed when a signal or a fault comes between, done at the next start,
said by the exit status."""

import io
import json
import os
import signal
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import build_mesh
from tests.support.pool import ranks
from trainer.errors import BAD_RUN, DONE, UserError
from trainer.evaluation import assessment, held_out
from trainer.evaluation.assessment import Assessment
from trainer.launch.elastic import RankInfo
from trainer.preflight.prepare import load_config
from trainer.run_dir import make_run_dir
from trainer.stages import run
from trainer.verify.whole_runs import write_documents

COMMON = (
    "steps=4",
    "context_length=48",
    "batch_tokens=96",
    "model.width=16",
    "model.layers=1",
    "model.heads=2",
    "data=files",
    "wandb.mode=disabled",
    "log.plots=false",
    "checkpoint.every=2",
    "evaluation.every=2",
    "evaluation.batches=2",
    "evaluation.sample_tokens=6",
    "precision=float64",
    "parallel.method=ring",
)


def signals_itself(*args, **kwargs):
    """In the place of a part of an evaluation: a signal comes, and the part sees it."""
    os.kill(os.getpid(), signal.SIGTERM)
    stop = kwargs["stop"] if "stop" in kwargs else args[4]
    assert stop()


def breaks(*args, **kwargs):
    raise IndexError("a layer has only 8 places")


def in_rank(env, words, directory, name, instead):
    """A whole run, in which a name of assessment or held_out may do something else: its exit
    status, and what was printed."""
    config = load_config(words, started=env.size)
    home = assessment if name not in (None, "evaluate") else held_out
    name = name or "evaluate"
    real = getattr(home, name)
    setattr(home, name, instead or real)
    try:
        place = RankInfo(env.rank, env.size, env.rank, env.size, torch.device("cpu"), "gloo")
        with redirect_stdout(io.StringIO()) as printed:
            return run(config, place, Path(directory)), printed.getvalue()
    finally:
        setattr(home, name, real)


def disagreeing(env):
    """One rank is in trouble, after other collectives than the others have begun: what each rank
    then raises."""
    here = Assessment.__new__(Assessment)
    here.mesh = build_mesh(env.size, 1)
    here.meeting = assessment._meeting(here.mesh, 60)
    here.config = SimpleNamespace(launch=SimpleNamespace(timeout_s=60))  # pyright: ignore[reportAttributeAccessIssue]
    trouble = IndexError("8 places") if env.rank == 1 else None
    # What ranks began before the part, in unlike number, is no sign of trouble.
    if env.rank == 1:
        dist.all_reduce(torch.zeros(1), group=here.mesh.world.group, async_op=True)
    before = assessment._collectives_begun(here.mesh)
    same = here._any_failed(trouble, before)
    if env.rank != 1:
        dist.all_reduce(torch.zeros(1), group=here.mesh.world.group)
    before = assessment._collectives_begun(here.mesh)
    if env.rank == 1:
        dist.all_reduce(torch.zeros(1), group=here.mesh.world.group, async_op=True)
    with pytest.raises(Exception) as raised:
        here._any_failed(trouble, before)
    if env.rank != 1:
        dist.all_reduce(torch.zeros(1), group=here.mesh.world.group)
    return same, type(raised.value).__name__


@pytest.fixture
def words(tmp_path):
    os.environ["HF_HUB_OFFLINE"] = "1"
    return (
        *COMMON,
        f"data.path={write_documents(tmp_path / 'text')}",
        f"data.cache={tmp_path / 'cache'}",
    )


def went(directory, words, *more, size=1, instead=None):
    make_run_dir(directory)
    ends = ranks(
        size,
        in_rank,
        (*words, *more, f"run_dir={directory}"),
        str(directory),
        *(instead or (None, None)),
    )
    assert [code for code, _ in ends] == [ends[0][0]] * size
    return ends[0]


def losses(directory):
    path = directory / "evaluation.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["step"]: row["value"] for row in rows if row["name"] == "held_out_loss"}


def checkpoints(directory):
    return [path.name for path in sorted((directory / "checkpoints").glob("step_*"))]


@pytest.mark.parametrize(
    ("size", "more"), [pytest.param(1, (), marks=pytest.mark.full), (3, ("parallel.context=3",))]
)
def test_what_a_signal_left_undone_is_owed_said_and_done_by_the_same_command(
    tmp_path, words, size, more
):
    whole = tmp_path / "whole"
    assert went(whole, words)[0] == DONE
    cut = tmp_path / "cut"
    for name, owed in (("evaluate", "held_out of step 2"), ("generate", "sample of step 4")):
        code, said = went(cut, words, *more, size=size, instead=(name, signals_itself))
        assert code == 143 and f"owed: {owed}" in said
    assert checkpoints(cut)[-1] == "step_00000004" and not (cut / "sample.txt").exists()
    assert went(cut, words, *more, size=size)[0] == DONE
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-9) and set(losses(cut)) == {2, 4}
    assert (cut / "sample.txt").read_text() == (whole / "sample.txt").read_text()
    before = (cut / "evaluation.jsonl").read_bytes()
    assert went(cut, words, *more, size=size)[0] == DONE
    assert (cut / "evaluation.jsonl").read_bytes() == before, "what was done is done again"
    best = json.loads((cut / "summary.json").read_text())["best_held_out_loss"]
    assert best == pytest.approx(min(losses(whole).values()), rel=1e-9)


@pytest.mark.parametrize(
    ("part", "size", "more"), [("evaluate", 1, ()), ("generate", 3, ("parallel.context=3",))]
)
def test_what_breaks_an_evaluation_is_said_and_ends_no_training(tmp_path, words, part, size, more):
    directory = tmp_path / "run"
    code, said = went(directory, words, *more, size=size, instead=(part, breaks))
    assert code == BAD_RUN and checkpoints(directory) == ["step_00000002", "step_00000004"]
    assert (
        "IndexError: a layer has only 8 places" in said
        and "trained to the last step, but not evaluated" in said
    )
    assert went(directory, words, *more, size=size)[0] == DONE
    assert 4 in losses(directory) and (directory / "sample.txt").exists()


def test_a_rank_alone_in_its_trouble_ends_the_run(tmp_path):
    assert ranks(3, disagreeing) == [
        (True, "RuntimeError"),
        (True, "IndexError"),
        (True, "RuntimeError"),
    ]


def test_what_is_switched_off_is_owed_no_more(tmp_path, words):
    directory = tmp_path / "run"
    assert went(directory, words, instead=("generate", signals_itself))[0] == 143
    assert went(directory, words, "evaluation.every=0", "evaluation.sample_tokens=0")[0] == DONE


@pytest.mark.parametrize(
    ("layer", "message"),
    [("mixer=hyena", "Filter|Hyena"), ("position=learned", "PositionTable"), ("mixer=full", None)],
)
def test_a_sample_longer_than_a_layer_can_take_is_refused_before_the_start(words, layer, message):
    long = [word for word in words if "generate" not in word and not word.startswith("model.heads")]
    asked = ("evaluation.prompt=ab", "evaluation.sample_tokens=48", layer, "parallel.method=auto")
    if message is None:
        load_config([*long, *asked])
        return
    with pytest.raises(
        UserError,
        match=(
            f"evaluation.sample_tokens=48: .* the 48 that ({message}) .* use"
            " evaluation.sample_tokens=47"
        ),
    ):
        load_config([*long, *asked])
    load_config([*long, *asked, "evaluation.sample_tokens=47"])
    load_config([*long, *asked, "evaluation.every=0"])
