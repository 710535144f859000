"""Attention maps of a run are those of one device, whatever ranks share the row and however."""

import contextlib
import io
import json
import os

import pytest
import torch

from models.analysis.attention_maps import leaves
from models.architectures.decoder import Decoder
from models.architectures.key_value import KeyValue
from models.attention.full import Attention
from models.feedforward import SwiGLU
from models.init import initialise
from models.memory.compressive import Compressive
from models.memory.lookup import Memorizing
from models.memory.segments import SegmentMemory
from models.positions.rope import Rope
from parallel.context_parallel import METHODS, apply_context_parallel
from parallel.engines.fsdp import Fsdp
from parallel.layout import POLICIES
from parallel.mesh import Mesh, build_mesh
from parallel.parallelize import parallelize
from tests.support.parity import relative
from tests.support.pool import ranks
from tests.trainer.verify.test_whole_runs import in_pool, in_rank
from tests.variants import HEADS, VARIANTS, WIDTH, Taught
from trainer.config.compose import compose
from trainer.data.batch_sharding import BatchSharder
from trainer.data.open import open_stream
from trainer.evaluation.attention_maps import (
    attention_maps,
    beginning,
    spread_out,
    state_maps,
    without_map,
)
from trainer.logs.run_logger import NO_MAPS
from trainer.optim.adamw import AdamW
from trainer.run_dir import make_run_dir
from trainer.verify.whole_runs import write_documents

LENGTH, TOKENS = 61, 40
MIXERS = (  # of the table: what is added to or done with the logits, what travels, what is a key
    "full",
    "longformer",
    "relative",
    "softcap_alibi",
    "sink_logit",
    "differential_t5",
    "latent",
    "lsh",
    "compressed",
    "prefix",
)
MEMORIES = {
    "segments": lambda: SegmentMemory(6, segment=4),
    "compressive": lambda: Compressive(segment=9),
    "lookup": lambda: Memorizing(20, segment=9, layers=[1], count=3),
}


def decoder(name):
    if name == "key_value":
        return initialise(KeyValue(257, WIDTH, hops=2), 5).double()
    memory = MEMORIES[name]() if name in MEMORIES else None
    mixers = [Attention(WIDTH, HEADS, 3, Rope()) if memory else VARIANTS[name]() for _ in range(2)]
    mixers = [mixer.inner if isinstance(mixer, Taught) else mixer for mixer in mixers]
    if memory:
        mixers = [
            memory.around(mixer, position=Rope(), layer=span, layers=2)
            for span, mixer in enumerate(mixers)
        ]
    return initialise(
        Decoder(257, WIDTH, mixers, [SwiGLU(WIDTH, 30) for _ in mixers], memory=memory), 5
    ).double()


@pytest.fixture
def folder(tmp_path):
    write_documents(tmp_path / "text")
    stream(tmp_path)
    return tmp_path


def stream(folder):
    data = {
        "_target_": "trainer.data.sources.files.Files",
        "path": str(folder / "text" / "*.txt"),
        "held_out": 0.2,
    }
    data["cache"] = str(folder / "cache")
    return open_stream(data, context_length=LENGTH, rows=3, seed=0, split="held_out")


def maps(model, mesh, folder, policy="zigzag", tokens=TOKENS):
    share = BatchSharder(
        mesh, rows=3, context_length=LENGTH, micro_batch="auto", policy=policy, prefix=5
    )
    found, left_out = attention_maps(model.eval(), share, stream(folder), tokens)
    assert left_out == 0
    return found


def differences(found, want):
    assert [each.name for each in found] == [each.name for each in want] and want
    assert all(
        torch.equal(a.kv_span.pos, b.kv_span.pos) and torch.equal(a.kv_span.role, b.kv_span.role)
        for a, b in zip(found, want)
    )
    return [relative(a.weight, b.weight) for a, b in zip(found, want)]


def shared(env, name, folder, method, policy):
    mesh = build_mesh(
        env.size,
        1,
        ulysses=env.size if method == "usp" else None,
        ring=1 if method == "usp" else None,
    )
    model = decoder(name)
    apply_context_parallel(model, mesh.context.group, method, grid=mesh.grid)
    return differences(maps(model, mesh, folder, policy), maps(decoder(name), Mesh.alone(), folder))


@pytest.mark.short(
    "0-full",
    "1-longformer",
    "5-differential_t5",
    "6-latent",
    "8-compressed",
    "10-segments",
    "13-key_value",
)
@pytest.mark.parametrize("turn, name", enumerate((*MIXERS, *MEMORIES, "key_value")))
def test_maps_over_three_ranks_are_those_of_one_device(turn, name, folder):
    methods = (
        ("ring", "allgather") if name == "key_value" else (*METHODS, "auto")
    )  # the others trade heads, of which it has one
    for step, method in enumerate(methods):
        policy = list(POLICIES)[(turn + step) % len(POLICIES)]
        for worst in ranks(3, shared, name, folder, method, policy):
            assert max(worst) < 1e-11, (method, policy, worst)


RECURRENT = ("gated_delta", "rwkv7", "mamba2", "retention")


def states(model, mesh, folder, policy="zigzag"):
    share = BatchSharder(
        mesh, rows=3, context_length=LENGTH, micro_batch="auto", policy=policy, prefix=5
    )
    return state_maps(model.eval(), share, stream(folder), TOKENS)


def state_differences(env, name, folder, policy):
    mesh = build_mesh(env.size, 1)
    model = decoder(name)
    apply_context_parallel(model, mesh.context.group, "ring")
    found = states(model, mesh, folder, policy)
    want = states(decoder(name), Mesh.alone(), folder)
    assert [each.name for each in found] == [each.name for each in want] and len(want) == 2
    worst = 0.0
    for one, other in zip(found, want):
        assert torch.equal(one.span.pos, other.span.pos) and one.reads.shape[1] == TOKENS
        for figure in ("kept", "written", "reads"):
            worst = max(worst, relative(getattr(one, figure), getattr(other, figure)))
        assert (one.corrected is None) == (other.corrected is None)
        if one.corrected is not None:
            worst = max(worst, relative(one.corrected, other.corrected))
    return worst


@pytest.mark.parametrize("turn, name", enumerate(RECURRENT))
def test_states_over_three_ranks_are_those_of_one_device(turn, name, folder):
    policy = list(POLICIES)[turn % len(POLICIES)]
    assert max(ranks(3, state_differences, name, folder, policy)) < 1e-11


def grid(env, folder):
    mesh = build_mesh(4, 1, ulysses=2, ring=2)
    model = decoder("full")
    apply_context_parallel(model, mesh.context.group, "usp", grid=mesh.grid)
    return differences(maps(model, mesh, folder), maps(decoder("full"), Mesh.alone(), folder))


def test_maps_over_a_grid_of_heads_and_ring_are_those_of_one_device(folder):
    for worst in ranks(4, grid, folder):
        assert max(worst) < 1e-11, worst


def sharded(env, folder):
    mesh = build_mesh(env.size, 1)
    optimiser = AdamW(
        learning_rate=0.001,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        auxiliary_weight=1.0,
    )
    engine = Fsdp(mesh, optimiser, precision="float64", checkpointing="selective")
    parallelize(decoder("relative"), engine, method="ring")
    return differences(
        maps(engine.model, mesh, folder), maps(decoder("relative"), Mesh.alone(), folder)
    )


def test_maps_of_sharded_parameters_are_those_of_one_device(folder):
    for worst in ranks(3, sharded, folder):
        assert max(worst) < 1e-11, worst


def test_the_text_is_the_beginning_of_the_first_held_out_row(folder):
    batch, _ = stream(folder).read(stream(folder).start())
    for tokens, got in ((7, 7), (500, LENGTH)):
        row = beginning(stream(folder), tokens)
        assert torch.equal(
            row.inputs(), batch.tokens[:1, :got]
        ) and row.doc.shape == row.pos.shape == (1, got + 1)
        assert maps(decoder("full"), Mesh.alone(), folder, tokens=tokens)[0].weight.shape == (
            HEADS,
            got,
            got,
        )


def test_deep_models_show_layers_from_bottom_to_top():
    assert spread_out(3, 12) == [0, 1, 2] and spread_out(0, 12) == []
    assert spread_out(13, 12)[0] == 0 and spread_out(96, 12)[-1] == 95
    assert all(len(set(spread_out(count, 12))) == 12 for count in range(12, 99))


def test_a_model_without_a_softmax_has_no_maps_but_states(folder):
    model = decoder("rwkv7")
    assert leaves(model) == {} and maps(model, Mesh.alone(), folder) == []
    assert len(states(model, Mesh.alone(), folder)) == 2
    assert {name.split(" ")[1] for name in without_map(model)} == {"(CausalConv)"}


def test_what_is_neither_a_softmax_nor_a_scan_is_said_to_have_no_map():
    assert "blocks.1.mixer.mix.0 (LongConv)" in without_map(decoder("hyena"))


@pytest.mark.parametrize(
    "words, told",
    [
        (
            "evaluation.attention_maps=8 evaluation.every=0",
            ["evaluation.attention_maps=8", "evaluation.every=0", "set evaluation.every"],
        ),
        ("evaluation.attention_maps=600", ["evaluation.attention_maps=600", "at most 512"]),
        ("evaluation.attention_maps=-1", ["evaluation.attention_maps=-1", "at least 0"]),
    ],
)
def test_maps_that_cannot_be_drawn_are_refused(words, told):
    [fault] = compose(words.split()).faults
    assert all(each in fault for each in told)


RUN = (
    "steps=4",
    "context_length=48",
    "batch_tokens=192",
    "model.width=32",
    "model.layers=2",
    "model.heads=4",
    "data=recall",
    "data.pairs=3",
    "data.length=16",
    "checkpoint.every=0",
    "evaluation.every=2",
    "evaluation.batches=1",
    "wandb.mode=disabled",
    "precision=float64",
    "evaluation.attention_maps=20",
)


def test_a_run_on_three_ranks_draws_what_one_device_draws_and_grades_every_evaluation(tmp_path):
    os.environ["HF_HUB_OFFLINE"] = "1"
    pictures = []
    for size, words in ((1, ("engine=single",)), (3, ("engine=fsdp", "parallel.context=3"))):
        directory = tmp_path / f"{size}"
        in_pool((*RUN, *words, "name=same", f"run_dir={directory}"), size, directory)
        pictures.append((directory / "report" / "attention.png").read_bytes())
        rows = [
            json.loads(line) for line in (directory / "evaluation.jsonl").read_text().splitlines()
        ]
        graded = [row["value"] for row in rows if row["name"] == "accuracy"]
        assert len(graded) == 2 and (directory / "report" / "grades.png").is_file()
        assert (
            json.loads((directory / "summary.json").read_text())["held_out_accuracy"] == graded[-1]
        )
    assert pictures[0] == pictures[1]


def said(env, words, directory):
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        assert in_rank(env, words, directory) == 0
    return screen.getvalue()


def test_a_run_without_attention_says_so_and_goes_on(tmp_path):
    os.environ["HF_HUB_OFFLINE"] = "1"
    words = (*RUN, "engine=single", "mixer=gated_delta", f"run_dir={tmp_path / 'run'}")
    make_run_dir(tmp_path / "run")
    [screen] = ranks(1, said, words, str(tmp_path / "run"))
    assert screen.count(NO_MAPS) == 1
    assert not (tmp_path / "run" / "report" / "attention.png").exists()
    page = (tmp_path / "run" / "report" / "attention.html").read_text()
    assert '"tracks"' in page and "(Scan)" not in page
    assert (tmp_path / "run" / "report" / "grades.png").exists()
