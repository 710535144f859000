"""Masked language modelling: BERT's shares, targets at their own place, and a choice made by
address alone."""

import pytest
import torch

from models.loss import IGNORE
from models.span import PADDING
from trainer.data.batch import Batch
from trainer.data.tokenizers import Bytes
from trainer.objectives.masked import Masked

END = Bytes.end_of_text


def text(rows=64, length=1024, seed=0):
    """Packed rows of random bytes: documents of 300 tokens with their ends, and padding behind."""
    tokens = torch.randint(
        0, 256, (rows, length + 1), generator=torch.Generator().manual_seed(seed)
    )
    place = torch.arange(length + 1).expand(rows, -1)
    pos, doc = place % 300, place // 300
    tokens = torch.where(pos == 299, END, tokens)
    doc = torch.where(place >= length - 10, PADDING, doc)
    return Batch(tokens, doc, pos.clone(), torch.zeros_like(tokens))


def made(batch, rows=None, seed=0, **settings):
    objective = Masked(**settings)
    rows = torch.arange(len(batch.tokens)) if rows is None else rows
    length = batch.tokens.shape[1] - 1
    return objective.apply(batch, rows, seed, objective.symbols(Bytes(), length), length)


def near(share, want, count):
    """Within five standard deviations of a binomial share."""
    return abs(share - want) < 5 * (want * (1 - want) / count) ** 0.5


def test_fifteen_percent_are_targets_and_of_these_eighty_ten_and_ten_are_masked_swapped_and_left():
    plain, batch = text(), made(text())
    read, was = batch.inputs(), plain.inputs()
    chosen = batch.targets() != IGNORE
    able = (plain.doc[:, :-1] >= 0) & (was != END)
    many = int(chosen.sum())
    assert near(many / int(able.sum()), 0.15, int(able.sum()))
    masked = chosen & (read == 257)
    assert near(int(masked.sum()) / many, 0.8, many)
    swapped = chosen & (read != 257) & (read != was)
    # A random token of 257 is the token itself now and then, and then counts among those that are
    # left.
    assert near(int(swapped.sum()) / many, 0.1 * 256 / 257, many)
    left = chosen & (read == was)
    assert near(int(left.sum()) / many, 0.1 + 0.1 / 257, many)
    assert near((read[swapped] < 128).double().mean().item(), 128 / 257, int(swapped.sum()))


def test_the_target_is_the_token_that_stood_there_and_all_else_is_as_it_was():
    plain, batch = text(), made(text())
    chosen = batch.targets() != IGNORE
    assert (batch.targets()[chosen] == plain.inputs()[chosen]).all()
    assert (batch.inputs()[~chosen] == plain.inputs()[~chosen]).all()
    assert (
        not (chosen & (plain.inputs() == END)).any()
        and not (chosen & (plain.doc[:, :-1] < 0)).any()
    )
    assert (
        (batch.doc == plain.doc).all()
        and (batch.pos == plain.pos).all()
        and (batch.role == plain.role).all()
    )
    assert batch.predictions() == int(chosen.sum())


def test_the_shares_are_settings():
    batch = made(text(8), probability=0.5, mask=0, random=1)
    chosen = batch.targets() != IGNORE
    assert near(chosen.double().mean().item(), 0.5 * 1014 / 1024, chosen.numel())
    assert not (batch.inputs() == 257).any() and (batch.inputs() != text(8).inputs()).any()
    whole = made(text(8), probability=1, mask=1, random=0)
    assert ((whole.inputs() == 257) == (whole.targets() != IGNORE)).all()


def test_the_choice_is_a_function_of_seed_row_document_and_position():
    every, rows = made(text()), torch.arange(64)
    part = slice(20, 31)
    few = made(Batch(*(x[part] for x in text()[:4])), rows[part])
    assert (few.tokens == every.tokens[part]).all() and (few.aims == every.aims[part]).all()
    # A row that begins elsewhere in the packing keeps the choice of every token by its address.
    shifted = made(Batch(*(x[:, 50:] for x in text()[:4])))
    assert (shifted.aims[:, :-1] == every.aims[:, 50:-1]).all()
    for other in (made(text(), seed=1), made(text(), rows + 64)):
        same = (other.aims != IGNORE) & (every.aims != IGNORE)
        assert near(same.double().mean().item(), 0.15**2, same.numel())


def test_documents_of_a_row_and_rows_draw_apart():
    chosen = made(text()).aims != IGNORE
    assert near((chosen[:, :299] & chosen[:, 300:599]).double().mean().item(), 0.15**2, 64 * 299)
    assert near((chosen[:-1] & chosen[1:])[:, :290].double().mean().item(), 0.15**2, 63 * 290)


@pytest.mark.parametrize(
    "settings",
    [
        {"probability": 0},
        {"probability": 1.5},
        {"mask": 0.9, "random": 0.2},
        {"mask": True},
        {"random": "much"},
    ],
)
def test_shares_that_are_none_are_refused(settings):
    with pytest.raises(ValueError, match=r"objective\."):
        Masked(**settings)


class Known(Bytes):
    """A tokenizer that has special tokens of its own."""

    def number(self, word):
        return {"<mask>": 7, "<extra_id_0>": 11}.get(word)


def test_the_mask_token_is_the_tokenizers_own_or_one_more():
    own, added = Masked().symbols(Known(), 64), Masked().symbols(Bytes(), 64)
    assert own.special == (7,) and own.vocabulary == 257 and own.added == 0
    assert added.special == (257,) and added.vocabulary == 258 and added.added == 1
    assert "token 257 (added, vocabulary 258)" in Masked().describe(added, 64)
