"""A loss or gradient that is no finite number, or leaps: the step is left out on every rank,
without a trace."""

import errno
import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from parallel.engines.materialize import local_tensor
from parallel.mesh import Mesh
from tests.support.pool import ranks
from trainer import run_dir as directories
from trainer.config.schema import OptimConfig
from trainer.data.batch_sharding import BatchSharder
from trainer.errors import BAD_RUN, UserError
from trainer.launch.elastic import RankInfo
from trainer.logs.jsonl import METRICS, read
from trainer.loop import Loop
from trainer.preflight.prepare import load_config
from trainer.progress import Progress
from trainer.run_dir import make_run_dir
from trainer.stages import run
from trainer.step.skip import LEAST, WINDOW, SkipStepGuard
from trainer.verify.whole_runs import write_documents

COMMON = (
    "context_length=48",
    "batch_tokens=240",
    "model.width=16",
    "model.layers=2",
    "model.heads=2",
    "schedule.warmup_steps=1",
    "data=files",
    "wandb.mode=disabled",
    "log.plots=false",
    "evaluation.every=0",
    "parallel.micro_batch=1",
    "log.every=100",
)
WAYS = {  # what is done to what the blocks of a micro-batch read
    "loss": lambda x: x * math.nan,
    "gradient": lambda x: x.register_hook(lambda grad: grad * math.inf) and x,
    "spike": lambda x: x.register_hook(lambda grad: grad * 1e4) and x,
}


def bits(loop):
    """All that a checkpoint would hold of the model and the optimiser."""
    return [local_tensor(t).clone() for part in loop.engine.state().values() for t in part.values()]


def poisoned(env, words, directory, way, steps, victim):
    """A run of which the last micro-batch of some steps is spoiled on one rank: (how it ended,
    steps that moved nothing)."""
    config = load_config(words, started=env.size)
    forward, step = nn.Embedding.forward, Loop.take_step
    now, still = {"step": 0, "left": 0}, []

    def spoil(self, tokens):
        out = forward(self, tokens)
        now["left"] -= 1
        hit = now["step"] in steps and now["left"] == 0 and env.rank == victim
        return WAYS[way](out) if hit else out

    def watched(self, progress, given):
        now.update(step=progress.step + 1, left=self.share.pieces)
        before = bits(self)
        step(self, progress, given)
        if all(torch.equal(a, b) for a, b in zip(before, bits(self))):
            still.append(progress.step)

    nn.Embedding.forward, Loop.take_step = spoil, watched
    try:
        place = RankInfo(env.rank, env.size, env.rank, env.size, torch.device("cpu"), "gloo")
        return run(config, place, Path(directory)), still
    except UserError as fault:
        return (fault.code, str(fault)), still
    finally:
        nn.Embedding.forward, Loop.take_step = forward, step


def went(folder, name, size, way, steps, *words, victim=0):
    directory = folder / name
    data = (
        f"data.path={write_documents(folder / 'text')}",
        f"data.cache={folder / 'cache'}",
        f"run_dir={directory}",
    )
    make_run_dir(directory)
    ends = ranks(size, poisoned, (*COMMON, *data, *words), str(directory), way, steps, victim)
    assert all(end == ends[0] for end in ends), "the ranks did not decide alike"
    return ends[0], {row["step"]: row for row in read(directory / METRICS)}


CASES = {
    "two ranks share rows": (2, 1, ("parallel.context=2", "engine=fsdp")),
    "rows are dealt": (3, 2, ("parallel.data=3", "engine=single")),
    "experts": (
        2,
        1,
        (
            "model=moe_topk",
            "model.feedforwards.experts.bias_speed=0.05",
            "parallel.data=2",
            "engine=single",
        ),
    ),
    "bfloat16": (2, 0, ("parallel.data=2", "engine=single", "precision=bfloat16")),
}


@pytest.mark.parametrize("way", ["loss", "gradient"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all_without_a_trace(
    case, way, tmp_path
):
    size, victim, words = CASES[case]
    words = (*words, "steps=4", "checkpoint.every=0")
    (code, still), rows = went(tmp_path, case, size, way, [2], *words, victim=victim)
    assert (code, still) == (0, [2])
    assert sorted(rows) == [1, 2, 4], "a step left out is logged whatever log.every is"
    assert "skipped" not in rows[4] and math.isfinite(rows[4]["loss"])
    assert rows[2]["tokens"] == rows[1]["tokens"] < rows[4]["tokens"]
    told = rows[2]["skipped"]
    assert told["cursor"]["rows"] == 5, "the address of the batch: the second of five rows each"
    if way == "loss":
        assert rows[2]["loss"] is None and "the loss is nan" in told["why"]
        assert told["rows"] == [
            {"two ranks share rows": 4, "rows are dealt": 5}.get(case, 2 if victim == 0 else 5)
        ]
    else:
        assert rows[2]["loss"] and rows[2]["grad_norm"] is None and told["rows"] == []


def test_the_batch_after_a_skipped_one_is_the_one_that_follows_it(tmp_path):
    words = ("steps=3", "checkpoint.every=0", "log.every=1")
    _, whole = went(tmp_path, "whole", 1, "loss", [], *words, "optim.learning_rate=1e-12")
    _, holed = went(tmp_path, "holed", 1, "loss", [2], *words, "optim.learning_rate=1e-12")
    assert "the loss is nan" in holed[2]["skipped"]["why"]
    assert holed[3]["loss"] == pytest.approx(whole[3]["loss"], rel=1e-6)


@pytest.mark.parametrize("memory", ["segments", "compressive"])
def test_a_memory_does_not_keep_what_was_not_finite(memory, tmp_path):
    words = (
        f"memory={memory}",
        "memory.segment=16",
        "steps=4",
        "checkpoint.every=0",
        "log.every=1",
    )
    more = ("memory.length=20", "position=relative") if memory == "segments" else ()
    _, clean = went(tmp_path, "clean", 1, "loss", [], *words, *more)
    (code, still), rows = went(tmp_path, "spoilt", 1, "loss", [2], *words, *more)
    assert (code, still) == (0, [2]) and rows[1]["loss"] == clean[1]["loss"]
    assert all(math.isfinite(rows[step]["loss"]) for step in (3, 4))


def test_after_max_skipped_in_a_row_the_run_ends_on_every_rank_and_its_checkpoint_is_whole(
    tmp_path,
):
    words = (
        "parallel.context=2",
        "engine=fsdp",
        "steps=9",
        "checkpoint.every=1",
        "checkpoint.keep=9",
        "optim.max_skipped=2",
    )
    ((code, told), still), rows = went(tmp_path, "run", 2, "loss", [2, 4, 5, 6], *words)
    assert code == BAD_RUN and still == [
        2,
        4,
    ], "a single one does not end it; the fifth is the second in a row"
    assert (
        "step 5: the loss is nan" in told
        and "optim.max_skipped=2" in told
        and "another run_dir" in told
    )
    assert rows[5]["skipped"] and 6 not in rows
    assert (
        sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))[-1]
        == "step_00000004"
    )


def guard(**settings):
    given = {
        "learning_rate": 1.0,
        "betas": (0.9, 0.9),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        **settings,
    }
    mesh = Mesh.alone()
    return SkipStepGuard(
        mesh,
        BatchSharder(mesh, rows=2, context_length=8, micro_batch=2, policy="zigzag"),
        OptimConfig.model_validate(given),
    )


def most(*figures):
    return torch.tensor([x if math.isfinite(x) else math.inf for x in figures])


def judged(judge, progress, norms):
    found = []
    for norm in norms:
        judge.look(torch.zeros(2, 8))
        found.append(
            judge.verdict(progress, 1.0, norm, most(1.0, norm), batch=({}, judge.noted()))
            is not None
        )
    return found


def test_a_leap_is_judged_by_the_median_of_finite_norms_and_a_nan_never_spoils_it():
    progress, judge = Progress({}), guard(skip_above=4.0)
    assert judged(judge, progress, [100.0] * (LEAST - 1) + [1000.0]) == [False] * LEAST, (
        "too few to tell"
    )
    assert judged(judge, progress, [math.nan, math.inf, 399.0, 401.0]) == [True, True, False, True]
    assert judged(judge, progress, [399.0]) == [False] and progress.skipped == 0
    assert len(progress.norms) == LEAST + 3
    assert judged(guard(skip_above=0.0), Progress({}), [1.0] * 20 + [1e9]) == [False] * 21
    assert not any(judged(judge, progress, [100.0] * 2 * WINDOW)) and len(progress.norms) == WINDOW
    grown = judged(judge, progress, [900.0] * WINDOW)
    assert grown[0] and not grown[-1], "where gradients have grown for good, the median follows"


def test_a_step_that_has_nothing_to_predict_is_left_out_and_too_many_end_the_run():
    progress, judge = Progress({}), guard(skip_above=4.0, max_skipped=3)
    for turn in range(3):
        judge.look(torch.zeros(2, 8))
        batch = {}, judge.noted()
        skip = judge.verdict(progress, 0.0, 0.0, most(0.0, 0.0), batch=batch, predicts=False)
        assert skip is not None and skip.finite and "has no token to predict" in skip.line(turn + 1)
        if turn < 2:
            judge.bear(progress, skip)
    assert not progress.norms, "a norm of nothing is nobody's usual"
    with pytest.raises(UserError, match="give documents of more tokens"):
        judge.bear(progress, skip)


def test_a_resumed_guard_judges_as_the_one_that_went_on():
    norms = [1.0 + (n * 37 % 11) / 7 for n in range(40)] + [9.0, 8.0, 7.9]
    truth, whole, judge = [], Progress({}), guard(skip_above=4.0)
    truth = judged(judge, whole, norms)
    part = Progress({})
    judged(guard(skip_above=4.0), part, norms[:41])
    resumed = Progress(**json.loads(json.dumps(part.extra())))
    assert judged(guard(skip_above=4.0), resumed, norms[41:]) == truth[41:] and any(truth[41:])
    assert asdict(resumed) == asdict(whole)


@pytest.mark.slow
def test_a_run_that_is_resumed_skips_the_same_spike(tmp_path):
    words = (
        "steps=20",
        "checkpoint.every=18",
        "optim.skip_above=5",
        "log.every=1",
        "optim.learning_rate=0.0001",
    )
    (code, still), whole = went(tmp_path, "whole", 1, "spike", [18, 20], *words)
    assert (code, still) == (0, [18, 20]) and "optim.skip_above=5 times the usual" in whole[20][
        "skipped"
    ]["why"]
    first = tmp_path / "whole" / "checkpoints" / "step_00000018"
    (_, still), rest = went(tmp_path, "rest", 1, "spike", [20], *words, f"resume={first}")
    assert still == [20] and rest[20]["skipped"] == whole[20]["skipped"]
    assert (rest[19]["loss"], rest[20]["loss"]) == (whole[19]["loss"], whole[20]["loss"])


def test_a_disk_that_is_full_before_the_first_step_is_told_in_a_sentence(tmp_path, monkeypatch):
    glob = write_documents(tmp_path / "text")
    config = load_config(
        [
            "data=files",
            f"data.path={glob}",
            f"data.cache={tmp_path / 'cache'}",
            "context_length=48",
            "batch_tokens=48",
        ]
    )

    def full(root, name, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(directories, "replace_inside", full)
    with pytest.raises(
        UserError, match="cannot be written: No space left on device; make room"
    ) as told:
        directories.record(tmp_path, config)
    assert told.value.code == BAD_RUN
    (tmp_path / directories.LOCK).mkdir()
    with (
        pytest.raises(UserError, match=r"cannot be written: \.lock: Is a directory; choose"),
        directories.lock(tmp_path),
    ):
        pass
