"""A task's grades stand beside the held-out loss, and are the same whatever the ranks."""

import pytest
import torch

from models.architectures.key_value import KeyValue
from models.architectures.ntm import NeuralTuringMachine
from models.init import initialise
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from parallel.context_parallel import apply_context_parallel
from parallel.mesh import Mesh, build_mesh
from tests.support.pool import ranks
from trainer.data.batch_sharding import BatchSharder
from trainer.data.open import open_stream
from trainer.data.tasks.copy import CopyTask
from trainer.evaluation.held_out import evaluate

LENGTH = 23


def stream():
    return open_stream(
        CopyTask(max_length=4, bits=3), context_length=LENGTH, rows=3, seed=0, split="held_out"
    )


def model(kind):
    vocabulary = stream().vocabulary
    made = (
        NeuralTuringMachine(vocabulary, 9, 1, slots=6, slot_width=4)
        if kind == "turing"
        else KeyValue(vocabulary, 8, fact=1)
    )
    return initialise(made, 5).double()


def graded(model, mesh):
    share = BatchSharder(mesh, rows=3, context_length=LENGTH, micro_batch=1, policy="zigzag")
    return evaluate(model, share, stream(), 2, lambda *_: False)


def in_rank(env, kind, context):
    mesh, many = build_mesh(context, env.size // context), model(kind)
    if context > 1:
        apply_context_parallel(many, mesh.context.group, "ring")
    return graded(many, mesh)


@pytest.mark.parametrize("kind", ["turing", "key value"])
@pytest.mark.parametrize(("size", "context"), [(3, 3), (2, 1), (4, 2)])
def test_grades_are_the_same_on_any_ranks(kind, size, context):
    want = graded(model(kind), Mesh.alone())
    assert set(want.graded) == {"accuracy", "wrong_bits"} and 0 < want.graded["wrong_bits"] < 1
    for found in ranks(size, in_rank, kind, context):
        assert found.graded == want.graded and abs(found.loss - want.loss) < 1e-12


def test_a_grade_is_the_share_of_targets_that_the_model_finds_likeliest():
    one, held_out, right, kv_span = model("turing"), stream(), 0, 0
    cursor = held_out.start()
    for _ in range(2):
        batch, cursor = held_out.read(cursor)
        said, wanted = one(MicroBatch(batch.inputs(), batch.span())).argmax(-1), batch.targets()
        right, kv_span = (
            right + int((said == wanted).sum()),
            kv_span + int((wanted != IGNORE).sum()),
        )
    assert graded(one, Mesh.alone()).graded["accuracy"] == right / kv_span
    with torch.no_grad():
        one.out.bias.copy_(torch.tensor([9.0, -9.0, 9.0, -9.0]))  # says 5 whatever it sees
    known = graded(one, Mesh.alone()).graded["accuracy"]
    assert 0 < known < 0.4
