"""A run's rows under an objective: resumed, in other batches and in evaluations they are the same
rows."""

import pytest
import torch

from models.loss import IGNORE
from trainer.config.compose import compose
from trainer.data.open import open_stream
from trainer.objectives.masked import Masked
from trainer.objectives.span_corruption import SpanCorruption
from trainer.objectives.stream import ObjectiveStream, open_rows
from trainer.verify.whole_runs import write_documents

LENGTH = 61
KINDS = [Masked, SpanCorruption]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objective")
    write_documents(folder / "text")
    return folder


def stream(folder, objective, rows=4, seed=0, split="train", lanes=False):
    data = {
        "_target_": "trainer.data.sources.files.Files",
        "path": str(folder / "text" / "*.txt"),
        "held_out": 0.2,
    }
    data["cache"] = str(folder / "cache")
    read = objective.reads(LENGTH)
    text = open_stream(data, context_length=read, rows=rows, seed=seed, split=split, lanes=lanes)
    return ObjectiveStream(
        text, objective, context_length=LENGTH, seed=seed if split == "train" else 0
    )


def read(stream, count, cursor=None):
    cursor, batches = cursor or stream.start(), []
    for _ in range(count):
        batch, cursor = stream.read(cursor)
        batches.append(batch)
    return batches, cursor


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cursor_goes_on_exactly(kind, folder):
    whole, _ = read(stream(folder, kind()), 5)
    first, cursor = read(stream(folder, kind()), 2)
    rest, _ = read(stream(folder, kind()), 3, cursor)
    assert all(equal(a, b) for a, b in zip(whole, [*first, *rest], strict=True))
    assert all((batch.aims != IGNORE).any() for batch in whole)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_other_batches_are_the_same_rows(kind, folder):
    four, _ = read(stream(folder, kind(), rows=4), 3)
    six, _ = read(stream(folder, kind(), rows=6), 2)
    assert all(torch.equal(a, b) for a, b in zip(_joined(four), _joined(six), strict=True))


def _joined(batches):
    """The tensors of batches, with the rows of all end to end."""
    return [torch.cat(columns) for columns in zip(*(batch.tensors() for batch in batches))]


def opened(folder, split, *words):
    """The rows of a run of these settings."""
    text = folder / "text" / "*.txt"
    given = (f"data.path={text}", f"data.cache={folder / 'cache'}", "data.held_out=0.2")
    sizes = (f"context_length={LENGTH}", f"batch_tokens={4 * LENGTH}")
    config = compose(["data=files", *given, *sizes, *words]).config
    assert config is not None
    return read(open_rows(config, split), 2)[0]


@pytest.mark.parametrize("name", ["masked", "span_corruption"])
def test_held_out_rows_are_the_same_for_every_seed_and_training_rows_are_not(name, folder):
    for split, same in (("held_out", True), ("train", False)):
        one, two = (opened(folder, split, f"objective={name}", f"seed={seed}") for seed in (1, 2))
        assert all(equal(a, b) for a, b in zip(one, two)) == same
    assert all(batch.aims is None for batch in opened(folder, "train"))


def test_a_text_that_is_read_again_is_masked_anew(folder):
    rows = stream(folder, Masked())
    epoch = rows.batches
    many, _ = read(rows, 2 * epoch)
    found = {}
    for batch in many:
        for tokens, aims in zip(
            torch.where(batch.aims == IGNORE, batch.tokens, batch.aims), batch.aims
        ):
            found.setdefault(tuple(tokens.tolist()), []).append((aims != IGNORE).tolist())
    again = [masks for masks in found.values() if len(masks) > 1]
    assert again and all(masks[0] != masks[1] for masks in again)


def test_another_objective_or_seed_has_another_fingerprint(folder):
    made = [
        stream(folder, Masked()),
        stream(folder, Masked(probability=0.2)),
        stream(folder, SpanCorruption()),
        stream(folder, Masked(), seed=1),
    ]
    assert len({one.fingerprint for one in made}) == 4
    with pytest.raises(ValueError, match="other data"):
        made[0].read(made[1].start())


def test_lanes_go_on_from_row_to_row(folder):
    rows = stream(folder, Masked(), lanes=True)
    (a, b), _ = read(rows, 2)
    going = (a.doc[:, -2] == b.doc[:, 0]) & (b.doc[:, 0] >= 0)
    assert going.any() and (b.pos[going, 0] == a.pos[going, -2] + 1).all()
