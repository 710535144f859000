"""A model in Python: logits, hidden states, attention, losses and texts, and what it refuses."""

import pytest
import torch
from torch.nn import functional as F

import longspan
from models.micro_batch import MicroBatch
from models.span import Span

WORDS = (
    "model=full",
    "model.width=32",
    "model.layers=2",
    "model.heads=4",
    "position=rope",
    "context_length=64",
    "batch_tokens=128",
    "precision=float64",
    "wandb.mode=disabled",
    "log.plots=false",
)
TEXT = "the cat sat on the mat"


@pytest.fixture(scope="module")
def model():
    built = longspan.build(WORDS)
    with torch.no_grad():
        for parameter in built.module.parameters():
            parameter.mul_(3)
    return built


def test_a_row_is_one_document_from_its_start(model):
    ids = torch.cat([model.encode("abcdef"), model.encode("ghijkl")])
    both = model.logits(ids)
    packed = Span(
        torch.tensor([[0, 1, 2, 3, 4, 5] * 2]),
        torch.tensor([[0] * 6 + [1] * 6]),
        torch.zeros(1, 12, dtype=torch.long),
    )
    with torch.no_grad():
        one_row = model.module(MicroBatch(ids.reshape(1, 12), packed))
    assert torch.allclose(both.reshape(1, 12, -1), one_row, atol=1e-12)
    assert torch.equal(model(ids.tolist()), both)
    assert not both.requires_grad


def test_hidden_states_are_what_the_head_reads_and_what_layers_leave(model):
    ids = model.encode(TEXT)
    with torch.no_grad():
        assert torch.allclose(model.module.head(model.hidden(ids)), model.logits(ids))
        last = model.hidden(ids, layer=-1)
        assert torch.allclose(model.module.norm(last), model.hidden(ids))
        assert not torch.allclose(model.hidden(ids, layer=0), last)
    with pytest.raises(ValueError, match="layer=2: the model has 2 layers"):
        model.hidden(ids, layer=2)


def test_attention_is_that_of_each_row(model):
    ids = torch.cat([model.encode("abcdef"), model.encode("fedcba")])
    weights = model.attention(ids)
    assert len(weights) == 2
    for weight in weights.values():
        assert weight.shape == (2, 4, 6, 6)
        assert torch.allclose(weight.sum(-1), torch.ones(()).double())
        assert weight.triu(1).abs().max() == 0
        assert not torch.allclose(weight[0], weight[1])
    for name, weight in model.attention(ids[1:]).items():
        assert torch.equal(weight[0], weights[name][1])


def test_the_loss_is_the_mean_over_all_tokens_but_the_first(model):
    ids = model.encode(TEXT)
    nats = F.cross_entropy(model.logits(ids)[0, :-1], ids[0, 1:], reduction="none")
    assert model.loss(TEXT) == pytest.approx(nats.mean().item(), rel=1e-12)
    other = model.token_losses(model.encode("abc"))
    total = (nats.sum() + other.sum()) / (len(nats) + 2)
    assert model.loss([TEXT, "abc", "x"]) == pytest.approx(total.item(), rel=1e-12)
    with pytest.raises(ValueError, match="no token after the first"):
        model.loss("x")


def test_the_likeliest_text_follows_the_logits(model):
    ids = model.encode("ab")
    for _ in range(6):
        ids = torch.cat([ids, model.logits(ids)[:, -1:].argmax(-1)], 1)
    assert model.generate("ab", tokens=6, temperature=0) == model.decode(ids[0, 2:])


def test_several_prompts_are_continued_and_seeds_count(model):
    several = model.generate_many(["ab", "cdef"], tokens=5)
    assert len(several) == 2
    assert model.generate("ab", tokens=5) == several[0]
    assert model.generate("ab", tokens=5, seed=1) != several[0]


def test_the_mode_of_training_comes_back(model):
    model.module.train()
    model.module.norm.eval()
    model.logits(model.encode(TEXT))
    assert model.module.training and model.module.head.training
    assert not model.module.norm.training
    model.module.eval()


def test_mistakes_are_said(model):
    with pytest.raises(AttributeError, match="no genrate; did you mean generate"):
        model.genrate  # noqa: B018
    for ids, message in (
        ([1, 2], r"ids: \[2\] of torch.int64; token numbers \[B, T\]"),
        ([[1.5, 2.0]], "token numbers"),
        ([[3, 257]], "ids: 3 to 257, but tokens are 0 to 256"),
        ([[-1, 5]], "ids: -1 to 5"),
    ):
        with pytest.raises(ValueError, match=message):
            model.logits(ids)
    with pytest.raises(ValueError, match="tokens=0: new tokens"):
        model.generate("a", tokens=0)
    with pytest.raises(ValueError, match="give a list"):
        model.generate_many("a")
    with pytest.raises(ValueError, match="temperature=-1"):
        model.generate("a", temperature=-1)


def test_a_model_that_learned_something_else_writes_no_text():
    built = longspan.build([*WORDS, "objective=masked", "mixer=bidirectional"])
    assert built.logits(built.encode(TEXT)).shape[:2] == (1, len(TEXT))
    for call in (built.generate, built.loss):
        with pytest.raises(ValueError, match=r"objective=masked does not teach the next token"):
            call(TEXT)


def test_longer_rows_than_the_positions_are_refused():
    built = longspan.build([*WORDS, "position=learned", "position.max_length=64"])
    built.logits(torch.zeros(1, 64, dtype=torch.long))
    with pytest.raises(ValueError, match="a row of 65 tokens, but the model takes 64"):
        built.logits(torch.zeros(1, 65, dtype=torch.long))
