"""The Neural Turing Machine against the paper's equations in plain loops; recurrent models over
documents, rows and bits."""

import math

import pytest
import torch

from models.architectures.lstm import Lstm
from models.architectures.ntm import NeuralTuringMachine, address, written
from models.architectures.token_by_token import code
from models.carried_state import CarriedState, name_stateful_modules
from models.init import initialise
from models.loss import IGNORE
from models.memory.lookup import Memorizing
from models.memory.segments import SegmentMemory
from models.micro_batch import MicroBatch
from models.span import PADDING, Span

VOCABULARY = 19
MODELS = {
    "turing": lambda memory=None: NeuralTuringMachine(
        VOCABULARY, 7, 2, memory, slots=6, slot_width=4
    ),
    "turing with lstm": lambda memory=None: NeuralTuringMachine(
        VOCABULARY, 5, 1, memory, slots=5, slot_width=3, controller="lstm"
    ),
    "lstm": lambda memory=None: Lstm(VOCABULARY, 6, 2, memory),
}


def made(name, memory=None):
    model = initialise(MODELS[name](memory), seed=3).double()
    name_stateful_modules(model)
    return model


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens_of(rows, count, seed=0):
    return torch.randint(VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


def cosine(u, v):
    return (
        sum(a * b for a, b in zip(u, v))
        / math.sqrt(sum(a * a for a in u))
        / math.sqrt(sum(b * b for b in v))
    )


@pytest.mark.parametrize("reach", [1, 2])
def test_heads_go_where_equations_5_to_9_say(reach):
    rows, heads, slots, width = 2, 3, 7, 4
    key, before = drawn(rows, heads, width), drawn(rows, heads, slots, seed=1).softmax(-1)
    memory, shift = (
        drawn(rows, slots, width, seed=2),
        drawn(rows, heads, 2 * reach + 1, seed=3).softmax(-1),
    )
    beta, gate, gamma = (drawn(rows, heads, 1, seed=seed).exp() for seed in (4, 5, 6))
    gate, gamma = gate / (1 + gate), 1 + gamma
    got = address(key, beta, gate, shift, gamma, before, memory)
    for b in range(rows):
        for h in range(heads):
            beta_, gate_, gamma_ = (x[b, h, 0].item() for x in (beta, gate, gamma))
            alike = [
                math.exp(beta_ * cosine(key[b, h].tolist(), memory[b, i].tolist()))
                for i in range(slots)
            ]
            content = [each / sum(alike) for each in alike]
            mixed = [
                gate_ * content[i] + (1 - gate_) * before[b, h, i].item() for i in range(slots)
            ]
            moves = {
                offset % slots: shift[b, h, offset + reach].item()
                for offset in range(-reach, reach + 1)
            }
            moved = [
                sum(mixed[j] * moves.get((i - j) % slots, 0.0) for j in range(slots))
                for i in range(slots)
            ]
            sharp = [each**gamma_ for each in moved]
            want = torch.tensor([each / sum(sharp) for each in sharp], dtype=torch.float64)
            assert (got[b, h] - want).abs().max() < 1e-11


def test_a_memory_is_erased_by_all_heads_and_then_added_to():
    memory, places = drawn(2, 5, 3), drawn(2, 2, 5, seed=1).softmax(-1)
    erase, add = drawn(2, 2, 3, seed=2).sigmoid(), drawn(2, 2, 3, seed=3)
    got = written(memory, places, erase, add)
    for b in range(2):
        for i in range(5):
            for m in range(3):
                left = memory[b, i, m].item()
                for h in range(2):
                    left *= 1 - places[b, h, i].item() * erase[b, h, m].item()
                want = left + sum(places[b, h, i].item() * add[b, h, m].item() for h in range(2))
                assert abs(got[b, i, m].item() - want) < 1e-12


def test_a_step_reads_the_memory_before_it_is_written_to():
    model = made("turing")
    memory, places, read = model.blank(1, torch.zeros((), dtype=torch.float64))
    memory = drawn(1, 6, 4)
    _, (after, where, got) = model.token(
        code(torch.tensor([5]), 5).double(), (memory, places, read)
    )
    assert torch.allclose(got, (where[:, :2] @ memory).flatten(1), atol=1e-12)
    assert not torch.allclose(got, (where[:, :2] @ after).flatten(1), atol=1e-3)
    assert torch.allclose(where.sum(-1), torch.ones(1, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_independent_bits_and_log_probabilities_agree(name):
    model, tokens = made(name), tokens_of(2, 6)
    span, targets = Span.line(2, 6), tokens_of(2, 6, seed=1)
    targets[0, 2] = IGNORE
    losses, every = model(MicroBatch(tokens, span, targets)), model(MicroBatch(tokens, span))
    assert losses[0, 2] == 0
    valid = targets != IGNORE
    assert torch.allclose(
        losses[valid], -every.gather(-1, targets.clamp_min(0)[..., None])[..., 0][valid]
    )
    assert every.shape == (2, 6, VOCABULARY) and (every.exp().sum(-1) <= 1 + 1e-12).all()
    whole = (
        type(model)(32, 6, 1) if name == "lstm" else type(model)(32, 6, 1, slots=5)
    )  # every code is a token
    assert torch.allclose(
        initialise(whole, 0).double()(MicroBatch(tokens, span)).exp().sum(-1),
        torch.ones(2, 6).double(),
    )


def test_the_code_of_a_token_is_its_number_lowest_bit_first():
    assert code(torch.tensor([0, 1, 6, 256]), 9).tolist()[2:] == [
        [0, 1, 1] + [0] * 6,
        [0] * 8 + [1],
    ]


def packed(*lengths, total):
    pos, doc = torch.zeros(1, total, dtype=torch.long), torch.full((1, total), PADDING)
    begin = 0
    for number, length in enumerate(lengths):
        pos[0, begin : begin + length] = torch.arange(length)
        doc[0, begin : begin + length] = number
        begin += length
    return Span.of(pos, doc)


@pytest.mark.parametrize("name", MODELS)
def test_a_document_in_a_row_is_what_it_is_alone(name):
    model, tokens = made(name), tokens_of(1, 14)
    together = model(MicroBatch(tokens, packed(5, 1, 6, total=14)))
    for begin, length in ((0, 5), (5, 1), (6, 6)):
        part = slice(begin, begin + length)
        assert torch.allclose(
            model(MicroBatch(tokens[:, part], Span.line(1, length))), together[:, part], atol=1e-12
        )


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_lane_with_their_past_are_the_whole_at_once(name):
    model, tokens = made(name, SegmentMemory(0)), tokens_of(1, 13)
    whole, past, found = model(MicroBatch(tokens, packed(9, 4, total=13))), CarriedState(), []
    for first, last in (
        (0, 4),
        (4, 5),
        (5, 11),
        (11, 13),
    ):  # cuts in documents; the second begins at 9
        span = packed(9, 4, total=13).map(lambda t, first=first, last=last: t[:, first:last])
        found.append(model(MicroBatch(tokens[:, first:last], past.attach(span))))
        past.advance()
    assert torch.allclose(torch.cat(found, 1), whole, atol=1e-12)
    assert past.bytes() == sum(t.numel() * 8 for t in model.blank(1, torch.zeros(())))
    alone = model(MicroBatch(tokens[:, 4:9], packed(9, 4, total=13).map(lambda t: t[:, 4:9])))
    assert not torch.allclose(alone, whole[:, 4:9], atol=1e-3), (
        "without a past a row starts from nothing"
    )


@pytest.mark.parametrize("name", MODELS)
def test_no_token_sees_a_later_one(name):
    model, x = made(name), tokens_of(1, 8)
    changed = x.clone()
    changed[0, 5] = (changed[0, 5] + 7) % VOCABULARY
    moved = (
        (model(MicroBatch(x, Span.line(1, 8))) - model(MicroBatch(changed, Span.line(1, 8))))
        .abs()
        .amax(-1)[0]
    )
    assert (moved[:5] == 0).all() and (moved[5:] > 0).all()


def test_a_model_with_a_state_of_its_own_takes_no_other_memory():
    for build in (MODELS["lstm"], MODELS["turing"]):
        with pytest.raises(
            ValueError,
            match=r"takes no other memory; use memory=segments memory.length=0, or memory=none",
        ):
            build(Memorizing(8, layers=None, segment=None, count=2, device=None))
        with pytest.raises(ValueError, match=r"memory.length=5"):
            build(SegmentMemory(5))


def test_sizes_that_make_no_machine_are_refused():
    with pytest.raises(ValueError, match="unknown controller=gru; choose one of feedforward, lstm"):
        NeuralTuringMachine(8, 4, 1, controller="gru")
    for wrong in ({"slots": 2}, {"reach": 0}, {"slot_width": 0}, {"reach": 3, "slots": 6}):
        with pytest.raises(ValueError, match="use reach=1 or more, slots="):
            NeuralTuringMachine(8, 4, 1, **wrong)
