"""Every yaml of a part as a run: steps, evaluations, saves, and a resume on another number of
ranks.

Mixers begin on two ranks that share each row and go on alone; models begin alone and go on on two.
Objectives, optimisers, schedules and data are dealt out among them, so that each is met as well.
`make test` runs one of every family, and every optimiser, schedule and source; the others of a
family differ in their equations alone, which the tests of models/ and parallel/ compare.
"""

import json
import shutil
from itertools import cycle
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from models.carried_state import name_stateful_modules
from models.init import initialise
from tests.support.case_cover import least_cover
from tests.support.families import family
from tests.support.pool import ranks
from trainer.config.build_model import build_cache, build_model
from trainer.decoding.scheduler import Scheduler, TextRequest
from trainer.launch.elastic import RankInfo
from trainer.logs import run_logger
from trainer.logs.jsonl import METRICS, read
from trainer.preflight.prepare import load_config
from trainer.preflight.reach import fitting
from trainer.run_dir import make_run_dir
from trainer.stages import run
from trainer.verify.whole_runs import write_documents

CONF = Path(__file__).parents[2] / "conf"
TOKENS = 96
COMMON = (
    "steps=2",
    f"context_length={TOKENS}",
    f"batch_tokens={2 * TOKENS}",
    "model.width=16",
    "model.layers=2",
    "model.heads=2",
    "model.ffn=16",
    "checkpoint.every=1",
    "evaluation.every=2",
    "evaluation.batches=1",
    "evaluation.sample_tokens=0",
    "wandb.mode=disabled",
    "log.plots=false",
    "precision=float64",
    "launch.timeout_s=60",
)
NEEDED = {  # what a yaml cannot do without, or would make a run of this size long
    "data=repeat_copy": ("data.max_length=4", "data.max_repeats=3"),
    "mixer=bidirectional": ("objective=masked", "data=files"),
    "mixer=mamba2": ("mixer.state=4",),
    # Documents longer than its prefix, which holds no target.
    "mixer=prefix": ("data=files",),
    "memory=compressive": ("memory.segment=16", "data=files"),
    "memory=lookup": ("memory.length=32", "memory.layers=[0]", "data=files"),
    "memory=segments": ("memory.length=32", "data=files"),
    "memory=tokens": ("memory.length=2", "memory.segment=16", "data=files"),
    "model=deep_sets": ("data=sets",),
    "model=gat": ("data=graphs",),
    "model=multimodal": ("data=requests",),
    "model=set_transformer": ("data=sets",),
    "model=encoder_decoder": ("data=reverse", "data.min_length=2", "data.max_length=9"),
    "model=seq2seq": ("data=reverse", "model.attention=bahdanau"),
    "model=t5": ("data=pairs",),
    "model=transformer": ("data=reverse", "data.source_length=40"),
    "model=ntm": ("model.slots=8", "model.slot_width=4"),
    "schedule=wsd": ("schedule.warmup_steps=1", "schedule.decay_steps=1"),
}
# One position of every family stands beside a mixer that takes it, and needs no run of its own.
BESIDE = {
    "mixer=bigbird": ("position=alibi",),
    "mixer=lsh": ("position=learned",),
    "mixer=gated_linear": ("position=none",),
    "mixer=compressed": ("position=llama3",),
}
OF_TWO_STREAMS = ("data=pairs", "data=reverse")  # what only models of two streams read
ALONE = ("parallel.context=1", "parallel.data=1", "engine=single")
SHARED = ("parallel.context=2", "parallel.data=1", "engine=fsdp")
APART = ("parallel.context=1", "parallel.data=2", "engine=fsdp")


BASES = ("decoder", "hub")  # the one has no mixers, the other needs a folder


def only_names_a_mixer(path):
    """Whether a yaml of conf/model says no more than mixer=NAME does."""
    return (
        yaml.safe_load(path.read_text()).keys() == {"defaults", "pattern"}
        and (CONF / "mixer" / path.name).exists()
    )


def yamls(group):
    """The parts of a group, without the models that mixer=NAME already runs."""
    return sorted(
        f"{group}={path.stem}"
        for path in (CONF / group).glob("*.yaml")
        if path.stem not in ("decoder", "hub")
        and not (group == "model" and only_names_a_mixer(path))
    )


def dealt():
    """(words, how it begins, how it goes on) of every case."""
    optims, schedules = cycle(yamls("optim")), cycle(yamls("schedule"))
    # Only model=gat reads edges, and only model=multimodal requests.
    apart = ("data=graphs", "data=requests", *OF_TWO_STREAMS)
    data = cycle(word for word in yamls("data") if word not in apart)
    cases = []
    for group, begin, then in (
        ("mixer", SHARED, ALONE),
        ("model", ALONE, SHARED),
        ("position", SHARED, ALONE),
        ("memory", APART, ALONE),
    ):
        for word in yamls(group):
            others = [next(optims), next(schedules), *BESIDE.get(word, ())]
            if not any(more.startswith("data=") for more in NEEDED.get(word, ())):
                others.append(next(data))
            cases.append(((word, *others), begin, then))
    return cases


CASES = dealt()


def kept():
    """The indices of the cases of `make test`."""
    axes = []
    for words, _, _ in CASES:
        dealt = {word.partition("=")[0]: word for word in words}
        position = dealt.pop("position", None)
        axes.append(
            [
                # The first word, where it is no position: every other run has memory=none, too.
                words[0] in (position, "memory=none") or family(words[0]),
                position and family(position),
                *(dealt.get(key) for key in ("optim", "schedule", "data")),
            ]
        )
    return least_cover(axes)


KEPT = kept()


@pytest.mark.parametrize("word", yamls("cache"))
def test_every_cache_generates(word):
    """Texts of a pass without a cache, where it is exact; as long, where it is not."""
    # Heads of 8 channels are no groups of 32.
    more = ("cache.group=8",) if word == "cache=quantized" else ()
    config = load_config((*COMMON, "model=full", word, *more))
    model = initialise(build_model(config, 17), 0).double().eval()
    name_stateful_modules(model)
    requests = [TextRequest(list(prompt), 12) for prompt in ([3, 1, 4, 1, 5], [9, 2])]
    scheduler = Scheduler(model, build_cache(config), rows=2)
    for request in requests:
        scheduler.submit(request)
    list(scheduler.run())
    assert [len(request.tokens) for request in requests] == [12, 12]
    if word in ("cache=contiguous", "cache=paged"):
        for request in requests:
            row = [*request.prompt, *request.tokens]
            logits = model(torch.tensor([row]))[0]
            likeliest = logits.argmax(-1)[len(request.prompt) - 1 : -1]
            assert likeliest.tolist() == request.tokens


def test_every_yaml_is_met():
    met = {
        word
        for words, _, _ in CASES
        for word in (*words, *(more for word in words for more in NEEDED.get(word, ())))
    }
    for group in ("mixer", "model", "position", "memory", "optim", "schedule", "data"):
        assert set(yamls(group)) <= met


def in_rank(env, config, directory):
    where = RankInfo(env.rank, env.size, env.rank, env.size, torch.device("cpu"), "gloo")
    # Drawing knows no yaml of these groups, and would take half of so short a run.
    with mock.patch.object(run_logger, "plots", return_value=[]):
        return run(config, where, Path(directory))


def start(words, how, directory):
    """Runs with the config composed once, for all ranks."""
    config = load_config((*words, *how), started=size_of(how))
    assert ranks(size_of(how), in_rank, config, str(directory)) == [0] * size_of(how)


def size_of(how):
    return 1 if how is ALONE else 2


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    glob = Path(write_documents(folder / "text"))
    hub = folder / "hub"
    hub.mkdir()
    lines = [
        json.dumps({"text": f"line {number} of a text that is long enough to be read " * 3})
        for number in range(200)
    ]
    (hub / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pairs = [f"source {number}\ttarget of {number}" for number in range(60)]
    (folder / "pairs.tsv").write_text("\n".join(["source\ttarget", *pairs]), encoding="utf-8")
    paths = (f"data.path={glob}", f"data.cache={folder / 'cache'}")
    return {
        "data=files": paths,
        "data=stdlib": (f"data.cache={folder / 'cache'}",),
        "data=hub": (f"data.name={hub}",),
        "data=pairs": (
            f"data.path={folder / 'pairs.tsv'}",
            f"data.cache={folder / 'cache'}",
            "data.held_out=0.2",
        ),
        "data=conversations": (
            f"data.path={hub / 'train.jsonl'}",
            f"data.cache={folder / 'cache'}",
            "data.chat_template=chatml",
        ),
        "data=mixture": (
            "+data@data.sources.near=files",
            "+data@data.sources.far=hub",
            f"data.sources.near.path={glob}",
            f"data.sources.near.cache={folder / 'cache'}",
            f"data.sources.far.name={hub}",
            "data.weights.near=3",
            "data.weights.far=[[0,1],[2,4]]",
        ),
    }


def spelled(words, texts):
    needed = [more for word in words for more in NEEDED.get(word, ())]
    chosen = [*words, *needed]
    return (*COMMON, *chosen, *(more for word in chosen for more in texts.get(word, ())))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, begin, then",
    [
        pytest.param(*case, marks=() if number in KEPT else pytest.mark.full, id=case[0][0])
        for number, case in enumerate(CASES)
    ],
)
def test_it_steps_evaluates_saves_and_goes_on(words, begin, then, texts, tmp_path):
    check_run(words, begin, then, texts, tmp_path / "run")


@pytest.mark.full
@pytest.mark.parametrize(
    "begin, then", [(ALONE, ALONE), (SHARED, APART), (APART, SHARED)], ids=["1-1", "2c-2d", "2d-2c"]
)
@pytest.mark.parametrize(
    "words", [words for words, _, _ in CASES], ids=[words[0] for words, _, _ in CASES]
)
def test_it_does_so_on_any_number_of_ranks(words, begin, then, texts, tmp_path):
    check_run(words, begin, then, texts, tmp_path / "run")


def check_run(words, begin, then, texts, directory):
    """Two steps, then the second again from the checkpoint of the first: the same loss, to
    rounding."""
    asked = (*fitting(spelled(words, texts)), f"run_dir={directory}")
    make_run_dir(directory)
    start(asked, begin, directory)
    before = list(read(directory / METRICS))
    held_out = list(read(directory / "evaluation.jsonl"))
    assert [row["step"] for row in before] == [1, 2] and {row["step"] for row in held_out} == {2}
    shutil.rmtree(directory / "checkpoints" / "step_00000002")
    start(asked, then, directory)
    after = list(read(directory / METRICS))
    assert [row["step"] for row in after] == [1, 2]
    assert after[1]["loss"] == pytest.approx(before[1]["loss"], rel=1e-9)
    assert (directory / "checkpoints" / "step_00000002").is_dir()
