"""Greedy and beam search, and models of two streams that go on from a state or from scratch."""

from itertools import product

import pytest
import torch

from models.carried_state import name_stateful_modules
from parallel.context_parallel import apply_context_parallel
from parallel.mesh import Mesh, build_mesh
from tests.support.pool import ranks
from tests.support.two_streams import FromScratch, recurrent, roughened, transformer
from trainer.data.batch_sharding import BatchSharder
from trainer.decoding.two_streams import BeamSearch, decode, documents, translate

START, END = 0, 1
SOURCES = [[3, 4, 5, 6, 7], [8, 2], [9, 9, 4]]
WORDS = 4


def table(history):
    """Log-probabilities of the next token after a history."""
    generator = torch.Generator().manual_seed(hash(tuple(history)) % 2**31)
    return torch.randn(WORDS, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)


class Tables:
    """Rates next tokens by `table`."""

    def __init__(self, rows):
        self.said = [[] for _ in range(rows)]

    def __call__(self, last, rows):
        parents = [self.said[row] for row in rows.tolist()]
        self.said = [[*said, token] for said, token in zip(parents, last.tolist(), strict=True)]
        return torch.stack([table(said) for said in self.said])


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all_targets(penalty):
    search = BeamSearch(START, END, most=4, beams=WORDS**3, length_penalty=penalty)
    others = [token for token in range(WORDS) if token != END]
    rated = []
    for length in range(4):
        for tokens in product(others, repeat=length):
            log = 0.0
            history = [START]
            for token in (*tokens, END):
                log += float(table(history)[token])
                history.append(token)
            rated.append((log / ((5 + length + 1) / 6) ** penalty, list(tokens)))
    (found,) = decode(Tables(search.beams), 1, search)
    best = max(rated)
    assert found.tokens == best[1]
    assert abs(found.rating - best[0]) < 1e-12


def test_a_beam_of_one_is_greedy():
    (found,) = decode(Tables(1), 1, BeamSearch(START, END, most=9))
    history = [START]
    while (token := int(table(history).argmax())) != END and len(history) <= 9:
        history.append(token)
    assert found.tokens == history[1:]


def share_of(mesh):
    return BatchSharder(mesh, rows=1, context_length=8, micro_batch=1, policy="zigzag")


MODELS = {
    "transformer": transformer,
    "bahdanau": lambda: recurrent("bahdanau", "lstm", 2),
    "local_p": lambda: recurrent("local_p"),
    "none": lambda: recurrent("none"),
}


def model_of(name):
    model = roughened(MODELS[name]()).eval()
    name_stateful_modules(model)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_state_gives_what_passes_over_all_tokens_give(name, beams):
    model = model_of(name)
    share = share_of(Mesh.alone())
    search = BeamSearch(2, 1, most=6, beams=beams, length_penalty=0.6)
    continued = translate(model, share, SOURCES, search)
    scratch = decode(FromScratch(model, share, SOURCES, beams), len(SOURCES), search)
    assert [target.tokens for target in continued] == [target.tokens for target in scratch]
    for one, other in zip(continued, scratch, strict=True):
        assert abs(one.rating - other.rating) < 1e-10
    ratings = {round(target.rating, 9) for target in continued}
    assert len(ratings) == len(SOURCES), "sources make a difference"


def written_over_ranks(env, name, method, beams):
    """Targets over ranks, and the tokens that each call of the model was given."""
    mesh = build_mesh(env.size, 1)
    model = model_of(name)
    apply_context_parallel(model, mesh.context.group, method, grid=mesh.grid)
    search = BeamSearch(2, 1, most=6, beams=beams, length_penalty=0.6)
    widths = []
    model.register_forward_hook(lambda _, args, logits: widths.append(logits.shape[1]))
    found = translate(model, share_of(mesh), SOURCES, search)
    assert set(widths) == {1}, "a token costs one token"
    return [(target.tokens, target.rating) for target in found]


@pytest.mark.parametrize(
    ("name", "method", "beams"),
    [
        ("transformer", "ring", 3),
        ("transformer", "ulysses", 1),
        ("transformer", "allgather", 1),
        ("bahdanau", "ring", 3),
        ("local_p", "ring", 1),
        ("none", "ring", 1),
    ],
)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_share_sources_write_what_one_device_writes(name, method, beams, size):
    search = BeamSearch(2, 1, most=6, beams=beams, length_penalty=0.6)
    expected = translate(model_of(name), share_of(Mesh.alone()), SOURCES, search)
    # The second source has two tokens with its end: some of four ranks hold none of it.
    for found in ranks(size, written_over_ranks, name, method, beams):
        assert [tokens for tokens, _ in found] == [target.tokens for target in expected]
        for (_, rating), target in zip(found, expected, strict=True):
            assert abs(rating - target.rating) < 1e-10


def test_the_source_is_read_once():
    model = model_of("transformer")
    calls = []
    model.encoder_blocks[0].register_forward_hook(lambda *call: calls.append(call))
    model.blocks[0].cross.k.register_forward_hook(lambda *call: calls.append(call))
    translate(model, share_of(Mesh.alone()), SOURCES, BeamSearch(2, 1, most=5, beams=2))
    assert len(calls) == 2


def test_documents_have_padding_and_a_token_that_is_not_read():
    batch = documents([[5, 6], [7]])
    assert batch.inputs().tolist() == [[5, 6], [7, 0]]
    assert batch.span().doc.tolist() == [[0, 0], [0, -1]]
