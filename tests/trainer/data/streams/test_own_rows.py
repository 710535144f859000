"""A data rank's own rows are those of the whole batch, and what it reads is they alone."""

import json

import pytest
import torch

from tests.support.chats import CHATS, saved_tokenizer
from trainer.data.batch import Batch
from trainer.data.corpus import Corpus
from trainer.data.open import open_stream
from trainer.data.streams.synthetic import SyntheticStream
from trainer.objectives.masked import Masked
from trainer.objectives.span_corruption import SpanCorruption
from trainer.objectives.stream import ObjectiveStream

ROWS, LENGTH, STEPS = 7, 16, 5
SHAPE = {"context_length": LENGTH, "rows": ROWS, "seed": 0}
SOURCES = "trainer.data.sources."
TASK = {"_target_": "trainer.data.tasks.copy.CopyTask", "max_length": 6}
LONG_TASK = TASK | {"max_length": 20}  # an example goes on over several rows
WHOLE = {"hub"}  # streams that read all rows


@pytest.fixture
def nodes(tmp_path, files, texts, words):
    """Returns the node of a kind of data."""

    def node(kind):
        cache = {"cache": str(tmp_path / "cache"), "held_out": 0.0}
        if kind == "pairs":
            pairs = [{"de": "s" * (n % 7 + 1), "en": "t" * (n * 3 % 11 + 1)} for n in range(60)]
            path = tmp_path / "pairs.jsonl"
            path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
            fields = {"source_field": "de", "target_field": "en"}
            return {"_target_": f"{SOURCES}pairs.Pairs", "path": str(path)} | fields | cache
        if kind == "conversations":
            path = tmp_path / "chats.jsonl"
            path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in CHATS * 9))
            tokenizer = {"tokenizer": str(saved_tokenizer(tmp_path / "tokenizer"))}
            target = f"{SOURCES}conversations.Conversations"
            return {"_target_": target, "path": str(path)} | tokenizer | cache
        local = files(texts(words(60)), held_out=0.3)
        if kind == "mixture":
            other = files(texts(words(9), name="few.jsonl"), held_out=0.3)
            return {
                "_target_": f"{SOURCES}mixture.Mixture",
                "sources": {"texts": local, "few": other},
                "weights": {"texts": 2, "few": 1},
            }
        if kind == "hub":
            folder = tmp_path / "hub"
            folder.mkdir(exist_ok=True)
            texts(words(60), name="hub/data.jsonl")
            return {"_target_": f"{SOURCES}hub.Hub", "name": str(folder), "held_out": 0.0}
        return {"task": TASK, "long task": LONG_TASK}.get(kind, local)

    return node


def opened(nodes, kind):
    name, *words = kind.split(", ")
    split = "held_out" if "held out" in words else "train"
    stream = open_stream(nodes(name), **SHAPE, split=split, lanes="lanes" in words)
    for objective in (Masked(), SpanCorruption()):
        if type(objective).__name__ in words:
            stream = ObjectiveStream(stream, objective, context_length=LENGTH, seed=0)
    return stream


KINDS = ["files", "files, lanes", "files, held out", "files, Masked", "files, SpanCorruption"]
KINDS += [
    "pairs",
    "conversations",
    "task",
    "task, lanes",
    "long task, lanes",
    "hub",
    "mixture",
    "mixture, held out",
]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def dealt(stream, cursor, ranks):
    """What each data rank trains on, and the cursors behind it."""
    each = -(-ROWS // ranks)
    return [stream.read_rows(cursor, r * each, (r + 1) * each) for r in range(ranks)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_all_data_ranks_are_the_batch_and_numbered_alike_on_any_number(kind, nodes):
    stream = opened(nodes, kind)
    cursor = stream.start()
    for _ in range(STEPS):
        batch, following = stream.read(cursor)
        numbered = None
        for ranks in (1, 3, 5, ROWS):
            parts = dealt(stream, cursor, ranks)
            each = -(-ROWS // ranks)
            for rank, part in enumerate(parts):
                assert equal(part.batch, batch.part(rank * each, (rank + 1) * each))
                assert part.cursor == following
                assert part.first_numbers.shape == (each, 1)
            found = [part.batch.raised(part.first_numbers) for part in parts]
            # All that there are behind the last row is padding.
            docs = torch.cat([one.doc for one in found])
            assert (docs[ROWS:] == -1).all()
            numbered = docs[:ROWS] if numbered is None else numbered
            assert torch.equal(docs[:ROWS], numbered)
        rows_of = {}
        for row, doc in enumerate(numbered):
            for number in set(doc.tolist()) - {-1}:
                assert rows_of.setdefault(number, row) == row, "two rows share a document"
        if "task" not in kind and "SpanCorruption" not in kind:
            assert torch.equal(numbered, batch.numbered().doc)
        cursor = json.loads(json.dumps(following))


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_of_another_rank_is_read(kind, nodes, monkeypatch):
    stream = opened(nodes, kind)
    touched = []
    tokens, pack = Corpus.tokens, SyntheticStream._pack
    monkeypatch.setattr(Corpus, "tokens", lambda *args: touched.append(args) or tokens(*args))
    monkeypatch.setattr(SyntheticStream, "_pack", lambda *args: touched.append(args) or pack(*args))

    def amount(first, last):
        touched.clear()
        getattr(stream, "_stretches", {}).clear()
        stream.read_rows(stream.start(), first, last)
        return len(touched)

    parts = [amount(row, row + 1) for row in range(ROWS)]
    if kind in WHOLE:
        assert all(part == amount(0, ROWS) for part in parts)
    else:
        assert sum(parts) == amount(0, ROWS) and max(parts) < amount(0, ROWS)


def test_the_default_cuts_what_all_rows_are(nodes):
    stream = opened(nodes, "hub")
    rows = stream.read_rows(stream.start(), 5, 9)
    batch, _ = stream.read(stream.start())
    assert isinstance(rows.whole, Batch) and equal(rows.whole, batch)
    assert rows.first_numbers.tolist()[2:] == [[0], [0]]


@pytest.mark.parametrize("kind", ["files", "files, held out", "conversations", "task", "hub"])
def test_the_size_of_a_row_is_that_of_the_row_that_is_read(kind, nodes):
    name, *words = kind.split(", ")
    split = "held_out" if words else "train"
    stream = open_stream(nodes(name), **SHAPE | {"rows": 1}, split=split)
    cursor = stream.start()
    for _ in range(stream.batches or 3):
        size = stream.row_size(cursor)
        batch, cursor = stream.read(cursor)
        if kind in ("task", "hub"):
            assert size is None
        else:
            tokens = int((batch.doc[:, :-1] >= 0).sum())
            assert size == (tokens, int(batch.doc.max()) + 1, cursor)
