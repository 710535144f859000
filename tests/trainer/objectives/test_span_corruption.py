"""Span corruption: input and answer hold the text between them, nothing is cut off, and T5's shares
hold."""

import numpy as np
import pytest
import torch

from models.loss import IGNORE
from models.span import PADDING, PREFIX, TEXT
from trainer.data.batch import Batch
from trainer.data.tokenizers import Bytes
from trainer.objectives.span_corruption import Plan, SpanCorruption, corrupted

END, FIRST = Bytes.end_of_text, Bytes.vocabulary


def packed(lengths, length, seed=0):
    """[1, length + 1] one row of documents of these lengths, each with its end but the last, which
    is cut."""
    random = np.random.default_rng(seed)
    tokens, doc, pos = (
        torch.zeros(length + 1, dtype=torch.long),
        torch.full((length + 1,), PADDING),
        torch.zeros(length + 1).long(),
    )
    here = 0
    for number, size in enumerate(lengths):
        tokens[here : here + size] = torch.from_numpy(random.integers(0, 256, size))
        if number < len(lengths) - 1:
            tokens[here + size - 1] = END
        doc[here : here + size], pos[here : here + size] = number, torch.arange(size)
        here += size
    return Batch(*(x[None] for x in (tokens, doc, pos, torch.zeros_like(tokens))))


def made(batch, length, row=0, seed=0, **settings):
    objective = SpanCorruption(**settings)
    return objective.apply(
        batch, torch.tensor([row]), seed, objective.symbols(Bytes(), length), length
    )


def documents(batch):
    """(what is read, what follows) of each document, as lists; and what is to be said at each token
    of it."""
    row = [x[0].tolist() for x in (batch.tokens, batch.doc, batch.pos, batch.role, batch.aims)]
    parts = {}
    for token, doc, pos, role, aim in zip(*row):
        if doc != PADDING:
            there, answer, aims = parts.setdefault(doc, ([], [], []))
            assert pos == len(aims), "positions count through input and answer"
            assert role == PREFIX if not answer and role == PREFIX else role == TEXT, (
                "an input stands before its answer"
            )
            (there if role == PREFIX else answer).append(token)
            aims.append(aim)
    return parts


def put_back(there, answer):
    """The text, of an input and an answer."""
    answer = [token for token in answer if token != END]
    spans, number = {}, None
    for token in answer:
        if token >= FIRST:
            number = token
            spans[number] = []
        else:
            spans[number].append(token)
    sentinels = [token for token in there if token >= FIRST]
    assert sentinels == list(range(FIRST, FIRST + len(sentinels))), "sentinels come in order"
    if answer:
        assert (
            list(spans) == [*sentinels, FIRST + len(sentinels)]
            and spans[FIRST + len(sentinels)] == []
        )
        assert all(spans[token] for token in sentinels), "no span is empty"
    return [t for token in there for t in (spans[token] if token >= FIRST else [token])]


def test_the_example_of_the_paper():
    text = torch.arange(11)  # Thank you for inviting me to your party last week .
    there, answer = corrupted(text, Plan([2, 4], [2, 1]), (100, 101, 102))
    assert there == [0, 1, 100, 4, 5, 6, 7, 101] and answer == [100, 2, 3, 101, 8, 102]


LENGTH = 512
WHOLE = SpanCorruption().reads(LENGTH)
PACKINGS = [
    [WHOLE],
    [200, 1, 2, WHOLE - 203],
    [3] * 20,
    [1] * 30,
    [60] * (WHOLE // 60),
    [2] * (WHOLE // 2),
]


@pytest.mark.parametrize("lengths", PACKINGS, ids=str)
def test_every_text_can_be_put_back_together(lengths):
    plain = packed(lengths, WHOLE)
    batch = made(plain, LENGTH)
    assert batch.tokens.shape == (1, LENGTH + 1)
    parts = documents(batch)
    assert len(parts) == len(lengths)
    for number, (there, answer, aims) in parts.items():
        was = plain.tokens[0][plain.doc[0] == number].tolist()
        if answer:
            assert [token for token in was if token != END] == put_back(there, answer)
            assert (END in answer) == (END in was) == (answer[-1] == END)
        else:
            assert there == was and set(aims) == {IGNORE}
        said = [*answer, IGNORE]
        assert aims == [IGNORE] * (len(there) - 1) + said, (
            "the last of the input and each of the answer says what follows"
        )


def test_rows_that_have_room_are_corrupted_throughout():
    for lengths in PACKINGS[:2]:
        parts = documents(made(packed(lengths, WHOLE), LENGTH))
        assert all(answer for (_, answer, _), size in zip(parts.values(), lengths) if size > 2)


def test_rows_read_as_much_text_as_fits():
    for length in (8, 64, 511, 2048, 100_000):
        objective = SpanCorruption()
        read = objective.reads(length)
        size = read + 2 * objective.counts(read)[1] + 1
        more = read + 1 + 2 * objective.counts(read + 1)[1] + 1
        assert size <= length < more


def test_fifteen_percent_lie_in_spans_of_three_on_average():
    hidden, spans, sizes = 0, 0, []
    for row in range(50):
        there, answer, _ = documents(made(packed([WHOLE], WHOLE, row), LENGTH, row))[0]
        sentinels = [place for place, token in enumerate(answer) if token >= FIRST]
        sizes += [b - a - 1 for a, b in zip(sentinels, sentinels[1:])]
        assert there[0] < FIRST, "a text begins with a token of its own"
    hidden, spans = sum(sizes), len(sizes)
    assert abs(hidden / (50 * WHOLE) - 0.15) < 0.003 and abs(hidden / spans - 3) < 0.1
    assert len(set(sizes)) > 5, "spans are of many lengths"
    assert abs(sizes.count(1) / spans - 1 / 3) < 0.05, "as in a division that is drawn evenly"


def test_the_choice_is_a_function_of_seed_row_and_address():
    plain = packed([200, 100, 80], WHOLE)
    one = made(plain, LENGTH, row=5)
    together = SpanCorruption()
    rows = Batch(*(torch.cat([x, x, x]) for x in plain[:4]))
    symbols = together.symbols(Bytes(), LENGTH)
    three = together.apply(rows, torch.tensor([4, 5, 6]), 0, symbols, LENGTH)
    assert (three.tokens[1] == one.tokens[0]).all() and (three.aims[1] == one.aims[0]).all()
    assert (
        not (three.tokens[0] == three.tokens[1]).all()
        and not (three.tokens[1] == three.tokens[2]).all()
    )
    assert not (made(plain, LENGTH, row=5, seed=1).tokens == one.tokens).all()


def test_a_row_short_of_room_has_fewer_spans_and_loses_no_text():
    short = [5] * (WHOLE // 5)
    batch = made(packed(short, WHOLE), LENGTH)
    parts = documents(batch)
    asked = [bool(answer) for _, answer, _ in parts.values()]
    assert any(asked) and not all(asked) and asked == sorted(asked, reverse=True)
    assert sum(len(there) + len(answer) for there, answer, _ in parts.values()) <= LENGTH


def test_sentinels_are_as_many_as_a_row_may_need_or_as_many_as_are_set():
    objective = SpanCorruption()
    most = objective.counts(objective.reads(LENGTH))[1] + 1
    assert objective.symbols(Bytes(), LENGTH).special == tuple(range(FIRST, FIRST + most))
    assert SpanCorruption(sentinels=100).symbols(Bytes(), LENGTH).vocabulary == FIRST + 100
    with pytest.raises(
        ValueError, match=f"objective.sentinels={most - 1}.*use objective.sentinels={most}"
    ):
        SpanCorruption(sentinels=most - 1).words(LENGTH)


@pytest.mark.parametrize(
    "settings",
    [
        {"noise_density": 0},
        {"noise_density": 1},
        {"noise_density": None},
        {"mean_length": 0.5},
        {"mean_length": True},
        {"sentinels": 1},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=r"objective\."):
        SpanCorruption(**settings)
