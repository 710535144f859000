"""Whole runs on a device beside the host: the losses of the CPU, and no wait but for the figures.

The device is that of tests/support/card.py: it computes like a CPU, mixes with nothing of the host,
and tells who waits for it. Its ranks send through the host's memory, as ranks that share a GPU do.
"""

from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch

from models.span import to_device
from parallel.engines import optimizer_offload
from tests.support import card
from tests.support.card import CardTensor, card_pool, the_card
from tests.trainer.config.test_compose import BASES, OBJECTIVES
from tests.trainer.test_plans_ahead import COMMON
from trainer import stages
from trainer.config.compose import compose
from trainer.config.groups import choices
from trainer.launch.elastic import RankInfo
from trainer.logs.jsonl import EVALUATION, METRICS, read
from trainer.loop import Loop
from trainer.run_dir import make_run_dir
from trainer.verify.whole_runs import write_documents

SIZE = 2
AHEAD = 2  # steps after which plans are made ahead
NEEDED = {
    "trainer/step/sums.py": "the read of sums and norm",
    "parallel/collectives.py": "the backend sends from the host alone",
    "trainer/step/skip.py": "which rows spoilt a step that is skipped",
    "parallel/engines/optimizer_offload.py": "a copy to pinned memory, which none waits for",
    # how much there is to compute, or to send, is in the numbers of the step
    "models/kernels/pairs/": "chosen pairs",
    "models/primitives/block_topk.py": "chosen pairs",
    "models/kernels/grouped_mm.py": "tokens of experts, in float64",
    "parallel/drivers/expert_dispatch.py": "tokens of experts",
    "models/kernels/knn.py": "neighbours that are looked up",
    "models/primitives/knn.py": "neighbours that are looked up",
    "parallel/drivers/knn.py": "neighbours that are looked up",
    "models/primitives/neighbors.py": "edges of a graph",
    "parallel/drivers/neighbors.py": "edges of a graph",
    # addresses that are made on the device
    "models/positions/relative.py": "whether positions are unbroken",
    "models/kernels/block_plan.py": "addresses of what memories hold",
    "models/pieces/": "addresses of rows that are cut in time",
}
HEADS = "model.heads=2"
CASES = {
    "ring": ("model=bigbird", "parallel.method=ring", HEADS),
    "heads": ("model=full", "model.kv_heads=1", "parallel.method=ulysses", HEADS),
    "fetched keys": ("model=longformer", "parallel.method=allgather", HEADS),
    "scans": ("model=hybrid", HEADS),
    "filters": ("model=hyena",),
    "segments": ("model=full", "memory=tokens", HEADS),
    "token by token": ("model=lstm", "context_length=24", "batch_tokens=48"),
    "experts": ("model=moe_topk", "parallel.experts=2", HEADS),
    "documents": ("model=multimodal", "data=requests", HEADS),
    "moments on the host": ("model=full", "engine.offload=optimizer", "optim=muon", HEADS),
}
WITHOUT_HEADS = ["deep_sets", "hyena", "lstm", "mamba2", "rwkv6", "rwkv7", "seq2seq", "short_conv"]
EVALUATIONS = ["by_position", "copy", "in_context", "induction", "needle", "recall"]
SLOW = ("key_value", "ntm", "seq2seq")  # token by token, in Python


def in_rank(env, words, directory, on_card):
    """Takes a run; returns by place how often its later steps waited for the device."""
    device = the_card() if on_card else torch.device("cpu")
    take, found = Loop.take_step, Counter()

    def watched(self, progress, given):
        card.waits.clear()
        take(self, progress, given)
        if progress.step > AHEAD:
            waits = [wait for wait in card.waits if wait.thread != "prefetch"]
            found.update((wait.where, wait.what) for wait in waits)

    asked = compose(words)
    assert asked.config is not None and not asked.faults, asked.faults
    whereabouts = RankInfo(env.rank, env.size, env.rank, env.size, device, "gloo")
    with (
        mock.patch.object(Loop, "take_step", watched),
        mock.patch.object(optimizer_offload, "SMALL", 64),
        mock.patch.object(optimizer_offload, "_pinned", on_host),
    ):
        assert stages.run(asked.config, whereabouts, Path(directory)) == 0
    return found


def on_host(tensor):
    return torch.empty_like(tensor, device="cpu")


@pytest.fixture(scope="module")
def pool():
    with card_pool(SIZE) as run:
        yield run


def went(pool, folder, words, on_card):
    directory = folder / ("card" if on_card else "cpu")
    make_run_dir(directory)
    keys = {word.partition("=")[0] for word in words}
    common = [word for word in COMMON if word.partition("=")[0] not in keys]
    data = ()
    if "data" not in keys:
        data = f"data.path={write_documents(folder / 'text')}", f"data.cache={folder / 'cache'}"
    its = (*common, *data, "steps=4", "precision=float64", *words, f"parallel.context={SIZE}")
    waits = pool(in_rank, (*its, f"run_dir={directory}"), str(directory), on_card)
    told = [(row["loss"], row["grad_norm"]) for row in read(directory / METRICS)]
    if (directory / EVALUATION).exists():
        told += [(row["step"], row["value"]) for row in read(directory / EVALUATION)]
    return waits, told


def compare(pool, folder, words):
    waits, rows = went(pool, folder, words, True)
    # The host's own moments lie there.
    _, expected = went(pool, folder, [w for w in words if "offload" not in w], False)
    assert len(rows) >= 4 and len(rows) == len(expected)
    for told, wanted in zip(rows, expected, strict=True):
        assert told == pytest.approx(wanted, rel=1e-12)
    for found in waits:
        assert found["trainer/step/sums.py read", "copied from it"] == 2, "the card was at work"
        unknown = {at: n for at, n in found.items() if not at[0].startswith((*NEEDED,))}
        assert not unknown


@pytest.mark.parametrize("case", CASES)
def test_a_run_beside_the_host_is_that_of_the_host_and_waits_for_its_figures_alone(
    case, pool, tmp_path
):
    compare(pool, tmp_path, CASES[case])


@pytest.mark.full
@pytest.mark.parametrize("name", [n for n in choices("model") if n not in (*BASES, *SLOW)])
def test_every_model_trains_beside_the_host(name, pool, tmp_path):
    heads = () if name in WITHOUT_HEADS else (HEADS,)
    compare(pool, tmp_path, (f"model={name}", *OBJECTIVES.get(name, []), *heads))


@pytest.mark.full
@pytest.mark.parametrize(
    "words",
    [f"{group}={name}" for group in ("position", "memory") for name in choices(group)]
    + ["parallel.time=2", "engine.tile_tokens=16", "engine.checkpointing=selective", "lora.rank=2"]
    + ["engine.head_groups=2", "evaluation.every=2 checkpoint.every=3"]
    + [f"evaluation.every=2 evaluation={name}" for name in EVALUATIONS],
)
def test_every_setting_trains_beside_the_host(words, pool, tmp_path):
    compare(pool, tmp_path, ("model=full", HEADS, *words.split()))


def mixed(env):
    there = the_card()
    ones = torch.ones(3, device=there)
    assert type(ones) is CardTensor and ones.device.type == card.NAME
    with pytest.raises(RuntimeError, match="mixes"):
        ones + torch.ones(3)
    with pytest.raises(RuntimeError, match="numpy"):
        ones.numpy()
    card.waits.clear()
    told = []
    for work in (
        lambda: to_device([1, 2], there),
        lambda: to_device(torch.ones(2), there, torch.float64),
        lambda: torch.tensor([1, 2], device=there),
        lambda: torch.ones(2).to(there),
        lambda: ones.cpu(),
        lambda: ones.sum().item(),
        lambda: bool((ones > 0).all()),
        lambda: torch.equal(ones, ones),
        lambda: ones[ones > 0],
        lambda: ones.tolist(),
    ):
        in_our_code(work)
        told.append([wait.what for wait in card.waits])
        card.waits.clear()
    return told


def in_our_code(work):
    """Calls it from a function that says it is in a file of ours."""
    source = compile("def called(work): return work()", str(card.ROOT / "models" / "x.py"), "exec")
    names = {}
    exec(source, names)
    return names["called"](work)


def test_who_waits_for_the_card_is_told_and_who_mixes_is_refused(pool):
    copied, back, read = ["copied to it"], ["copied from it"], ["read"]
    expected = [[], [], copied, copied, back, read, read, read, ["counted"], read]
    assert pool(mixed) == [expected] * SIZE
