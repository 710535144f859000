"""Held-out loss and a sample are the same whatever the ranks, and the loss by position adds up to
the loss."""

import dataclasses

import pytest
import torch

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.feedforward import SwiGLU
from models.init import initialise
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.positions.rope import Rope
from parallel.context_parallel import apply_context_parallel
from parallel.mesh import Mesh, build_mesh
from tests.support.pool import ranks
from trainer.data.batch_sharding import BatchSharder
from trainer.data.open import open_stream
from trainer.data.tokenizers import Bytes
from trainer.evaluation.generate import generate
from trainer.evaluation.held_out import evaluate, position_bucket
from trainer.verify.whole_runs import write_documents


def decoder():
    mixers = [Attention(16, 4, 2, Rope()) for _ in range(2)]
    return initialise(Decoder(257, 16, mixers, [SwiGLU(16, 24) for _ in mixers]), 5).double()


@pytest.fixture
def folder(tmp_path):
    write_documents(tmp_path / "text")
    return tmp_path


def stream(folder):
    data = {
        "_target_": "trainer.data.sources.files.Files",
        "path": str(folder / "text" / "*.txt"),
        "held_out": 0.2,
    }
    data["cache"] = str(folder / "cache")
    return open_stream(data, context_length=61, rows=3, seed=0, split="held_out")


def share(mesh):
    return BatchSharder(mesh, rows=3, context_length=61, micro_batch="auto", policy="zigzag")


def never(*_):
    return False


def in_rank(env, folder, context):
    mesh = build_mesh(context, env.size // context)
    model = decoder()
    if context > 1:
        apply_context_parallel(model, mesh.context.group, "ring")
    found = evaluate(model, share(mesh), stream(folder), 4, never)
    return found, generate(model, share(mesh), Bytes(), "the cat", 12, seed=3, step=7)


@pytest.mark.parametrize(("size", "context"), [(3, 3), (2, 1)])
def test_it_is_the_same_on_any_ranks(size, context, folder):
    want = evaluate(decoder(), share(Mesh.alone()), stream(folder), 4, never)
    text = generate(decoder(), share(Mesh.alone()), Bytes(), "the cat", 12, seed=3, step=7)
    for found, sample in ranks(size, in_rank, folder, context):
        assert found.tokens == want.tokens and abs(found.loss - want.loss) < 1e-12
        assert [b["tokens"] for b in found.by_position] == [b["tokens"] for b in want.by_position]
        assert sample == text and text.startswith("the cat")


def test_positions_add_up_to_the_loss(folder):
    found = evaluate(decoder(), share(Mesh.alone()), stream(folder), 4, never)
    assert sum(b["tokens"] for b in found.by_position) == found.tokens
    assert (
        abs(sum(b["tokens"] * b["loss"] for b in found.by_position) / found.tokens - found.loss)
        < 1e-12
    )
    assert all(a["end"] == b["begin"] for a, b in zip(found.by_position, found.by_position[1:]))


def test_it_is_the_plain_mean_over_valid_targets(folder):
    held_out, model = stream(folder), decoder()
    batch, _ = held_out.read(held_out.start())
    with torch.no_grad():
        losses = model(MicroBatch(batch.inputs(), batch.span(), batch.targets()))
    valid = batch.targets() != IGNORE
    assert (
        abs(
            evaluate(model, share(Mesh.alone()), held_out, 1, never).loss
            - losses[valid].mean().item()
        )
        < 1e-12
    )


def test_a_signal_ends_it(folder):
    assert evaluate(decoder(), share(Mesh.alone()), stream(folder), 4, lambda *_: True) is None


def test_buckets_double():
    assert position_bucket(torch.tensor([0, 1, 2, 3, 4, 7, 8, 1023, 1024])).tolist() == [
        0,
        1,
        2,
        2,
        3,
        3,
        4,
        10,
        11,
    ]


def test_another_step_draws_another_sample():
    alone = share(dataclasses.replace(Mesh.alone()))
    texts = {generate(decoder(), alone, Bytes(), "a", 10, seed=3, step=step) for step in (1, 2, 3)}
    assert len(texts) > 1
