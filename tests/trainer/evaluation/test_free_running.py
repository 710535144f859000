"""What a model of two streams writes from held-out sources, and how many tokens are right."""

import pytest

from models.carried_state import name_stateful_modules
from parallel.context_parallel import apply_context_parallel
from parallel.mesh import Mesh, build_mesh
from tests.support.pool import ranks
from tests.support.two_streams import recurrent, roughened, transformer
from trainer.data.batch_sharding import BatchSharder
from trainer.data.open import open_stream
from trainer.errors import UserError
from trainer.evaluation.free_running import (
    grade_answers,
    graded,
    references_of,
    written_answers,
)
from trainer.preflight.prepare import load_config

LENGTH = 30
ANSWERS = 5
MODELS = {"transformer": transformer, "bahdanau": lambda: recurrent("bahdanau")}


def references():
    data = {"_target_": "trainer.data.tasks.reverse.Reverse", "symbols": 10}
    data |= {"min_length": 3, "max_length": 7}
    stream = open_stream(data, context_length=LENGTH, rows=2, seed=0, split="held_out")
    return references_of(stream, ANSWERS)


def share_of(mesh):
    return BatchSharder(mesh, rows=1, context_length=LENGTH, micro_batch=1, policy="zigzag")


def model_of(name):
    model = roughened(MODELS[name]()).eval()
    name_stateful_modules(model)
    return model


def test_a_token_is_right_where_the_reference_has_it():
    pairs = [([5], [9, 1, 2, 3, 9]), ([6], [9, 4, 9]), ([7], [9, 8, 9])]
    shares = graded([[1, 7, 3, 1], [4], []], pairs)
    # 1 and 3 of the first and 4 of the second; what is too much counts for nothing.
    assert shares == {"token_accuracy": 3 / 5, "exact": 1 / 3}


def test_references_are_the_pairs_of_the_rows():
    found = references()
    assert len(found) == ANSWERS
    for source, row in found:
        assert row[0] == row[-1] == source[-1] == 10
        assert row[1:-1] == source[-2::-1]


def over_ranks(env, name):
    mesh = build_mesh(env.size, 1)
    model = model_of(name)
    apply_context_parallel(model, mesh.context.group, "ring", grid=mesh.grid)
    share = share_of(mesh)
    return written_answers(model, share, references(), 2), grade_answers(
        model, share, references(), 2
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_rank_writes_the_answers_of_one_device(name):
    share = share_of(Mesh.alone())
    expected = written_answers(model_of(name), share, references(), 2)
    assert len({tuple(answer) for answer in expected}) > 1, "sources make a difference"
    for answers, shares in ranks(3, over_ranks, name):
        assert answers == expected
        assert shares == graded(expected, references())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model=full", "data=recall"), "it writes from sources, and the model reads none"),
        (
            ("model=seq2seq", "data=reverse", "evaluation.free_running.beams=40"),
            "evaluation.free_running.beams=40: there are 17 tokens to begin with",
        ),
        (
            ("model=seq2seq", "data=reverse", "evaluation.free_running.vary=min_length"),
            "vary and values belong together",
        ),
    ],
)
def test_each_mistake_gives_one_message(words, message):
    more = ("evaluation=[heldout,free_running]", "evaluation.sample_tokens=0")
    with pytest.raises(UserError, match=message):
        load_config((*words, *more, "wandb.mode=disabled"))
