"""Rows of pairs: each with its source, packed on both sides, and what is no pair."""

import json

import pytest
import torch

from models.loss import IGNORE
from parallel.mesh import Mesh
from trainer.data.batch import Batch
from trainer.data.batch_sharding import BatchSharder
from trainer.data.errors import DataError
from trainer.data.open import check, open_stream
from trainer.data.streams.pairs import first_fit

END = 256  # of a text in bytes
PAIRS = [(f"s{'o' * (n % 7)}{n}", f"t{'a' * (n * 3 % 11)}{n}") for n in range(40)]


def written(tmp_path, kind="jsonl", pairs=PAIRS, names=("de", "en")):
    path = tmp_path / f"pairs.{kind}"
    if kind == "tsv":
        lines = ["\t".join(row) for row in [("id", *names), *[("7", *pair) for pair in pairs]]]
    else:
        lines = [json.dumps(dict(zip(names, pair, strict=True))) for pair in pairs]
    path.write_text("\n".join(lines) + "\n")
    return {
        "_target_": "trainer.data.sources.pairs.Pairs",
        "path": str(path),
        "source_field": names[0],
        "target_field": names[1],
        "held_out": 0.0,
        "cache": str(tmp_path / "cache"),
    }


def read(node, batches=1, **settings):
    stream = open_stream(node, **{"context_length": 30, "rows": 4, "seed": 0} | settings)
    cursor = stream.start()
    found = []
    for _ in range(batches):
        batch, cursor = stream.read(cursor)
        found.append(batch)
    return stream, found


def texts(batch):
    """[(source, row)] of the documents of a batch; what is no text is left out."""
    found = []
    for row in range(len(batch.tokens)):
        for number in batch.doc[row].unique().tolist():
            if number >= 0:
                sides = (batch.source, batch)
                parts = [side.tokens[row][side.doc[row] == number].tolist() for side in sides]
                found.append(tuple(bytes(t for t in part if t < END).decode() for part in parts))
    return found


@pytest.mark.parametrize("kind", ["jsonl", "tsv"])
def test_an_epoch_holds_every_pair_once_with_its_source(tmp_path, kind):
    stream, _ = read(written(tmp_path, kind), rows=1)
    _, batches = read(written(tmp_path, kind), rows=1, batches=2 * stream.epoch_rows)
    epochs = batches[: stream.epoch_rows], batches[stream.epoch_rows :]
    orders = []
    for epoch in epochs:
        pairs = [pair for batch in epoch for pair in texts(batch)]
        assert sorted(pairs) == sorted(PAIRS)
        orders.append(pairs)
    assert orders[0] != orders[1]
    assert stream.epoch_rows < len(PAIRS) / 2, "several pairs in a row"


def test_a_row_begins_with_the_end_of_text_and_learns_every_other_token(tmp_path):
    _, (batch,) = read(written(tmp_path, pairs=[("abc", "xy")] * 2), rows=1)
    assert batch.tokens[0, :4].tolist() == [END, ord("x"), ord("y"), END]
    assert batch.targets()[0, :4].tolist() == [ord("x"), ord("y"), END, IGNORE]
    assert batch.source.tokens[0, :4].tolist() == [*b"abc", END]
    assert batch.source.pos[0, :4].tolist() == [0, 1, 2, 3]


def test_a_cursor_goes_on_where_it_stopped(tmp_path):
    stream, batches = read(written(tmp_path), batches=3)
    _, cursor = stream.read(stream.start())
    again, _ = stream.read(cursor)
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), batches[1].tensors()))
    assert len(list(again.tensors())) == 8


def test_a_pair_that_is_longer_than_a_row_is_refused_or_left_out(tmp_path):
    node = written(tmp_path, pairs=[*PAIRS, ("s" * 50, "t"), ("s", "t" * 60)])
    with pytest.raises(DataError) as error:
        read(node)
    for word in (
        "context_length=30: a target takes 61 tokens",
        "a source takes 51 tokens",
        "2 pairs are longer than a row",
        "data.source_length=51",
        "data.on_error=skip",
    ):
        assert word in str(error.value)
    stream, _ = read({**node, "on_error": "skip"})
    assert "left out 2 pairs" in stream.describe()
    read({**node, "source_length": 51}, context_length=61)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"de": "a"}', "line 2 has no text in the field en"),
        ('{"de": "a", "en": ""}', "line 2 has no text in the field en"),
        ('{"en": "a"}', "line 2 has no text in the field de"),
        ('{"de": "a", "en": 3}', "en is not a text but int"),
        ("[1]", "is not an object but list"),
    ],
)
def test_what_is_no_pair_is_named_before_ranks_start(tmp_path, line, message):
    node = written(tmp_path, pairs=[("a", "b")])
    with open(node["path"], "a") as file:
        file.write(line + "\n")
    (fault,) = check(node, context_length=30)
    assert message in fault and "data.on_error=skip" in fault
    assert not check({**node, "on_error": "skip"}, context_length=30)


def test_a_table_without_the_column_is_refused(tmp_path):
    node = written(tmp_path, "tsv") | {"target_field": "fr"}
    faults = check(node, context_length=30)
    assert "names the columns id, de, en, and none is fr (data.target_field)" in faults[0]


def test_two_fields_of_one_name_are_refused(tmp_path):
    assert "name two fields" in check(written(tmp_path) | {"target_field": "de"})[0]


def test_items_of_two_sizes_share_bins():
    assert first_fit([[5, 2], [2, 5], [1, 1], [6, 6]], (7, 7)) == [[0, 1], [2, 3]]


def test_numbers_stay_alike_on_both_sides_and_every_rank_gets_its_part():
    doc = torch.tensor([[0, 0, 1, 1, -1], [0, 0, 0, -1, -1]])
    source_doc = torch.tensor([[0, 1, 1], [1, 1, -1]])
    other = Batch(source_doc + 5, source_doc, source_doc * 0, source_doc * 0)
    batch = Batch(doc + 7, doc, doc * 0, doc * 0, source=other)
    numbered = batch.numbered()
    assert numbered.doc[1].tolist() == [2, 2, 2, -1, -1]
    # Document 1 of row 1 has a source alone, so row 1 has two numbers, and none is row 0's.
    assert numbered.source is not None and numbered.source.doc[1].tolist() == [3, 3, -1]
    part = batch.part(1, 3)
    assert part.source is not None and part.source.doc.tolist() == [[1, 1, -1], [-1, -1, -1]]
    sharder = BatchSharder(
        Mesh.alone(), rows=2, context_length=4, micro_batch=1, policy="contiguous"
    )
    pieces = [piece for piece, _ in sharder(batch)]
    assert [piece.source.tokens.tolist() for piece in pieces] == [[[5, 6]], [[6, 6]]]
    assert all(piece.source.targets is None for piece in pieces)
