"""The key-value memory network against its equations in plain loops: what is a slot, what is its
key, what follows from it."""

import pytest
import torch

from models.architectures.key_value import KeyValue
from models.init import initialise
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.span import PADDING, Span

VOCABULARY = 11


def made(**settings):
    return initialise(KeyValue(VOCABULARY, 6, **settings), seed=2).double()


def row():
    """Two documents of 8 and 4 tokens and padding."""
    pos = torch.tensor([[*range(8), *range(4), 0]])
    doc = torch.tensor([[0] * 8 + [1] * 4 + [PADDING]])
    tokens = torch.randint(VOCABULARY, (1, 13), generator=torch.Generator().manual_seed(1))
    return tokens, Span.of(pos, doc)


def spelled(model, words, span):
    """Logits at the place `at` of one document."""
    width, fact = 6, model.fact
    embedded = [model.embed.weight[word] for word in words]

    def bag(last, count):
        return sum(
            (embedded[t] for t in range(max(0, last - count + 1), last + 1)),
            torch.zeros(width).double(),
        )

    slots = [t for t in range(span + 1) if t % fact == 0]
    if model.shared:
        keys = values = [bag(t, max(2, fact)) for t in slots]
    else:
        keys = [bag(t - 1, max(1, fact - 1)) for t in slots]
        values = [model.value.weight[words[t]] for t in slots]
    q = bag(span, max(1, fact - 1))
    for turn in model.hops:
        weights = torch.stack([q @ key for key in keys]).softmax(0)
        q = turn.weight @ (q + sum(p * value for p, value in zip(weights, values)))
    return model.head.weight @ q


@pytest.mark.every_case
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("hops", "fact"), [(1, 3), (3, 3), (2, 1), (2, 2), (1, 4)])
def test_it_is_its_equations(hops, fact, shared):
    model, (tokens, span) = made(hops=hops, fact=fact, shared=shared), row()
    got = model(MicroBatch(tokens, span))
    for begin, length in ((0, 8), (8, 4)):
        words = tokens[0, begin : begin + length].tolist()
        for q_span in range(length):
            assert torch.allclose(
                got[0, begin + q_span], spelled(model, words, q_span), atol=1e-11
            ), (begin, q_span)


def test_losses_are_those_of_its_logits():
    model, (tokens, span) = made(), row()
    targets = torch.roll(tokens, -1, 1)
    targets[0, [3, 12]] = IGNORE
    losses = model(MicroBatch(tokens, span, targets))
    want = torch.nn.functional.cross_entropy(
        model(MicroBatch(tokens, span))[0], targets[0], reduction="none", ignore_index=IGNORE
    )
    assert torch.allclose(losses[0], want, atol=1e-12)


def test_a_fact_is_read_in_its_direction():
    """Matched exactly, the key gives the value; shared vectors cannot tell who follows whom."""
    model = made(hops=1)
    with torch.no_grad():
        for table in (model.embed, model.value):
            table.weight.copy_(torch.eye(VOCABULARY, 6).double() * 4)
        model.hops[0].weight.copy_(torch.eye(6).double())
    follows, (a, b, c) = 5, (0, 1, 2)
    tokens = torch.tensor(
        [[4, a, follows, b, b, follows, c, b, follows]]
    )  # a is followed by b, b by c; and b by?
    found = []
    model.hops[0].register_forward_hook(lambda _, args, out: found.append(out))
    model(MicroBatch(tokens, Span.line(1, 9)))
    assert found[0][0, -1, c] > 3.9 and found[0][0, -1, a] < 0.1


def test_sizes_that_make_no_memory_are_refused():
    with pytest.raises(ValueError, match="hops=0"):
        KeyValue(5, 4, hops=0)
    with pytest.raises(ValueError, match="fact=0"):
        KeyValue(5, 4, fact=0)
