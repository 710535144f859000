"""Ranks that would train on different texts, or with different weights, end the run and say who
they are."""

import json
import re
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from parallel.engines.materialize import local_tensor
from parallel.engines.replica_checks import compare_tensors, held
from parallel.mesh import build_mesh
from tests.support import small_model
from tests.support.pool import ranks
from tests.support.small_model import ENGINES
from tests.trainer.verify.test_whole_runs import in_rank
from trainer.agreement import Marks, agree, agree_on_weights, mark
from trainer.data.batch import Batch
from trainer.data.sources.hub import Hub
from trainer.data.split import digest, is_held_out
from trainer.errors import BAD_RUN, UserError
from trainer.run_dir import make_run_dir
from trainer.stop_signal import StopSignal
from trainer.verify.whole_runs import write_documents


def batch(change=None):
    tokens = torch.arange(12).view(2, 6)
    fields = [tokens, torch.zeros_like(tokens), tokens % 6, torch.zeros_like(tokens)]
    if change is not None:
        fields[change][1, 3] += 1
    return Batch(*fields)


def test_a_mark_stands_for_all_of_a_batch_and_for_its_data():
    marks = [
        mark(batch()),
        *(mark(batch(field)) for field in range(4)),
        mark(batch(), "other data"),
    ]
    marks += [
        mark(batch()._replace(aims=batch().tokens)),
        mark(batch()._replace(source=batch())),
        mark(batch()._replace(source=batch(0))),
        mark(batch()._replace(tokens=batch().tokens.flip(1))),
    ]
    assert len(set(marks)) == len(marks) and mark(batch()) == marks[0]
    assert 0 < max(marks) < 2**53, "a float64 holds it exactly"


def met(env, odd, context, column):
    """Every data rank has rows of its own; some ranks read others, or at another place."""
    mesh = build_mesh(context, env.size // context)
    stop = StopSignal(mesh, ())
    marks = Marks(mark(batch()), mark(batch(), f"rows of {mesh.data.rank}"))
    assert not stop.asked() and stop.meet(marks, (mesh.data.rank + 1.0, 2.0)) == [
        sum(range(1, mesh.data.size + 1)),
        2.0 * mesh.data.size,
    ]
    if env.rank in odd:
        marks = marks._replace(**{column: mark(batch(3))})
    try:
        stop.meet(marks, (), "step 7")
    except UserError as fault:
        return fault.code, str(fault)


@pytest.mark.parametrize(
    ("odd", "context", "column", "said"),
    [
        ([], 1, "rows", None),
        ([1], 1, "rows", None),  # nobody else has these rows
        ([1], 3, "rows", "step 7: rank 1 read another batch than ranks 0 and 2, though all that"),
        ([0], 3, "rows", "step 7: rank 0 read another batch than ranks 1 and 2, though all that"),
        ([0, 2], 3, "step", "step 7: rank 1 read another batch than ranks 0 and 2, though every"),
        ([2], 1, "step", "step 7: rank 2 read another batch than ranks 0 and 1, though every"),
    ],
)
def test_ranks_with_another_batch_are_named_on_every_rank(odd, context, column, said):
    for found in ranks(3, met, odd, context, column):
        assert (
            found is None if said is None else (found[0] == BAD_RUN and found[1].startswith(said))
        )


def caught(env, context):
    stop = StopSignal(build_mesh(context, env.size // context), ())
    stop.noted = 15 if env.rank == 1 else 0
    return stop.meet(Marks(1, 1), (1.0,)), stop.caught


def test_a_signal_on_one_rank_stops_all():
    assert ranks(3, caught, 3) == [(None, 15)] * 3


WORDS = "the quick brown fox jumps over the lazy dog and runs into the wood"
DOCUMENTS, HELD_OUT = 200, 0.2
COMMON = (
    "context_length=48",
    "batch_tokens=192",
    "model.width=16",
    "model.layers=1",
    "model.heads=2",
    "model.kv_heads=2",
    "wandb.mode=disabled",
    "log.plots=false",
    "checkpoint.every=0",
    "evaluation.batches=2",
    "parallel.context=3",
    f"data.held_out={HELD_OUT}",
)


class Listed:
    """Examples in a list, with a state as `datasets` has it."""

    def __init__(self, texts):
        self.texts, self.place = texts, 0

    def __iter__(self):
        while self.place < len(self.texts):
            self.place += 1
            yield {"text": self.texts[self.place - 1]}

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def torn_run(env, words, directory, odd_document):
    """A run over streamed data, of which the last rank reads one document in capitals."""

    def opened(hub):
        texts = [f"{number} {WORDS}" for number in range(DOCUMENTS)]
        if env.rank == env.size - 1:
            texts[odd_document] = texts[odd_document].upper()
        return Listed(texts)

    with mock.patch.object(Hub, "open", opened), pytest.raises(UserError) as caught:
        in_rank(env, words, directory)
    return str(caught.value)


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_a_run_whose_ranks_read_different_texts_ends(where, tmp_path):
    evaluates = where == "evaluation"
    hashes = np.array([digest(f"document {number}") for number in range(DOCUMENTS)], np.uint64)
    kept = is_held_out(hashes, HELD_OUT) == evaluates
    odd = int(
        np.flatnonzero(kept)[12 if not evaluates else 0]
    )  # of training documents, not one of the first batch
    words = (
        *COMMON,
        "steps=6" if not evaluates else "steps=1",
        f"evaluation.every={int(evaluates)}",
    )
    hub = tmp_path / "hub"
    hub.mkdir()
    # The library looks at the files before `open`, which alone is replaced.
    (hub / "train.jsonl").write_text(json.dumps({"text": WORDS}) + "\n")
    words += ("data=hub", f"data.name={hub}", f"run_dir={tmp_path / 'run'}")
    make_run_dir(tmp_path / "run")
    batch = "held-out batch 1" if evaluates else "step [2-6]"
    for said in ranks(3, torn_run, words, str(tmp_path / "run"), odd):
        assert re.match(f"{batch}: rank 2 read another batch than ranks 0 and 1,", said), said


def files_of_its_own(env, words, folder):
    """A run whose last rank lies on a machine with another version of a file."""
    here = Path(folder) / str(env.rank)
    documents = write_documents(here / "text")
    if env.rank == env.size - 1:
        with open(next((here / "text").glob("*.txt")), "a") as file:
            file.write("and one word more")
    make_run_dir(here / "run")
    words = [
        *words,
        f"data.path={documents}",
        f"data.cache={here / 'cache'}",
        f"run_dir={here / 'run'}",
    ]
    # the settings of all ranks come from one file; here only what they find under them differs
    with (
        mock.patch("trainer.run.directories.plain_config", lambda config: {}),
        pytest.raises(UserError) as caught,
    ):
        in_rank(env, words, str(here / "run"))
    return str(caught.value)


def test_a_run_whose_machines_have_different_files_does_not_begin(tmp_path):
    words = (*COMMON, "steps=1", "evaluation.every=0", "data=files", "data.held_out=0")
    for said in ranks(3, files_of_its_own, words, str(tmp_path)):
        assert said.startswith(
            "after the run was built: the training data of rank 2 differ from those of ranks 0"
            " and 1,"
        )


def facts(env):
    mesh = build_mesh(1, env.size)
    agree(mesh, {"the settings": {"a": 1}}, "now")
    with pytest.raises(UserError) as caught:
        agree(mesh, {"the settings": {"a": 1}, "the weights": env.rank == 1}, "now")
    return str(caught.value)


def test_facts_that_differ_are_named():
    assert all(
        said.startswith("now: the weights of rank 1 differ from those of ranks 0 and 2,")
        for said in ranks(3, facts)
    )


def spoilt(env, name, model, options, hit):
    """What is said of an engine, and of it after one number of a copy was changed on rank 1."""
    mesh = build_mesh(
        1, env.size, **{key: value for key, value in options.items() if key != "precision"}
    )
    engine = ENGINES[name](
        mesh, small_model.OPTIM, precision=options.get("precision", "float64"), seed=3
    )
    engine.wrap(model())
    agree_on_weights(mesh, engine, "built")
    agree(mesh, {"the initial weights": engine.drawn}, "built")
    target = dict(held(engine))[hit]
    if env.rank == 1:
        with torch.no_grad():
            local_tensor(target).view(-1)[-1] += 1e-3
    return compare_tensors(held(engine), mesh.world.group), engine.drawn


WEIGHT, MOMENT = "blocks.0.up.weight", "blocks.1.up.weight.exp_avg (of the optimiser)"


@pytest.mark.parametrize(
    ("name", "options", "hit", "sides"),
    [
        ("single", {}, WEIGHT, ([1], [0, 2, 3])),
        ("single", {}, MOMENT, ([1], [0, 2, 3])),
        ("single", {"precision": "bfloat16"}, f"{WEIGHT} (as it is trained)", ([1], [0, 2, 3])),
        ("fsdp", {}, "wave", ([1], [0, 2, 3])),
        ("fsdp", {"replicas": 2}, WEIGHT, ([3], [1])),  # ranks 1 and 3 hold the same half
        ("fsdp", {}, WEIGHT, None),  # a shard that nobody else holds
    ],
)
def test_a_copy_that_differs_is_named_with_its_ranks(name, options, hit, sides):
    results = ranks(4, spoilt, name, small_model.on_meta, options, hit)
    assert len({drawn for _, drawn in results}) == 1
    for difference, _ in results:
        assert difference is None if sides is None else tuple(difference) == (hit, *sides)


def drawn_otherwise(env):
    """The last rank draws other weights; each holds a shard that no other rank holds."""
    mesh = build_mesh(1, env.size)
    engine = ENGINES["fsdp"](
        mesh, small_model.OPTIM, precision="float64", seed=3 + (env.rank == env.size - 1)
    )
    engine.wrap(small_model.on_meta())
    assert compare_tensors(held(engine), mesh.world.group) is None
    with pytest.raises(UserError) as caught:
        agree(mesh, {"the initial weights": engine.drawn}, "built")
    return str(caught.value)


def test_shards_of_different_drawings_are_told_apart():
    for said in ranks(3, drawn_otherwise):
        assert said.startswith(
            "built: the initial weights of rank 2 differ from those of ranks 0 and 1,"
        )


def signalled_while_meeting(env):
    """(what the meeting in which the signal comes gives, the next one, what is known)."""
    stop = StopSignal(build_mesh(env.size, 1), (signal.SIGUSR1,))
    plain = dist.all_reduce

    def interrupted(*args, **settings):
        work = plain(*args, **settings)
        if env.rank == 1:
            signal.raise_signal(signal.SIGUSR1)
        return work

    with stop.listening(), mock.patch.object(dist, "all_reduce", interrupted):
        first = stop.meet()
    return first, stop.meet(), stop.caught


def test_a_signal_that_comes_while_ranks_meet_is_told_at_the_next_meeting():
    assert ranks(2, signalled_while_meeting) == [([], None, signal.SIGUSR1)] * 2


def meets_ahead(env):
    """(answers of two meetings, the first begun before a signal, and what is known)."""
    mesh = replace(build_mesh(1, env.size), device=torch.device("meta"))
    stop = StopSignal(mesh, (signal.SIGUSR1,))
    with stop.listening():
        first = stop.begin(Marks(1, env.rank), (env.rank + 1.0,))
        before = stop.begin(Marks(2, env.rank), (1.0,))
        sums = first.answer()
        if env.rank == 2:
            signal.raise_signal(signal.SIGUSR1)
        return sums, stop.asked(), before.answer(), stop.caught


def test_a_meeting_goes_from_host_to_host_and_none_goes_on_where_a_later_one_tells_of_a_signal():
    """Its numbers would be lost on a device that keeps none."""
    assert ranks(3, meets_ahead) == [([6.0], True, None, signal.SIGUSR1)] * 3
