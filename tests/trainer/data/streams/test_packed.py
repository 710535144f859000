"""Rows of finite data: exact coverage, addresses, resume."""

import importlib
import inspect
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from models.loss import IGNORE
from trainer.data.errors import NONE_HELD_OUT, ONE_DOCUMENT
from trainer.data.open import check, open_stream


def batches(stream, count, cursor=None):
    """`count` batches, the cursor going through JSON every time, and the last cursor."""
    cursor, found = cursor or stream.start(), []
    for _ in range(count):
        batch, cursor = stream.read(json.loads(json.dumps(cursor)))
        found.append(batch)
    return found, cursor


def same(a, b):
    return all(torch.equal(x, y) if x is not None else y is None for x, y in zip(a, b, strict=True))


@pytest.mark.every_case
@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("context", [1, 4, 7, 64, 5000])
def test_every_token_is_predicted_exactly_once_per_epoch(opened, words, context, lanes):
    found = words(30)
    stream = opened(found, context_length=context, rows=3, lanes=lanes)
    once = Counter(byte for text in found for byte in [*text.encode()[1:], 256])
    epochs = 2
    rows = stream.batches * 3 if lanes else stream.epoch_rows
    read, _ = batches(stream, -(-rows * epochs // 3))
    flat = [
        row for batch in read for row in zip(*(t.unbind() for t in (batch.targets(), batch.doc)))
    ]
    for epoch in range(epochs):
        targets = torch.cat([row[0] for row in flat[epoch * rows : (epoch + 1) * rows]])
        assert Counter(t for t in targets.tolist() if t != IGNORE) == once


def test_rows_overlap_by_one_token_and_spell_the_documents(opened, words):
    found = words(20)
    stream = opened(found, context_length=9, rows=1)
    dealt, _ = batches(stream, stream.epoch_rows)
    read = [dealt[place] for place in np.argsort(stream._order(0))]  # as they were laid end to end
    for before, after in itertools.pairwise(read):
        assert before.tokens[0, -1] == after.tokens[0, 0]
    ids = [
        t
        for batch in read
        for t, d in zip(batch.tokens[0, :-1].tolist(), batch.doc[0, :-1].tolist())
        if d >= 0
    ]
    ids += [256] * (ids[-1] != 256)
    spelt = "".join(chr(i) if i < 256 else "|" for i in ids)
    assert sorted(spelt[:-1].split("|")) == sorted(found)


def test_rows_are_dealt_in_another_order_each_epoch(opened, words):
    stream = opened(words(60, longest=90), context_length=9, rows=1)
    orders = [stream._order(epoch).tolist() for epoch in (0, 1)]
    assert orders[0] != orders[1] and all(
        sorted(o) == list(range(stream.epoch_rows)) for o in orders
    )
    neighbours = sum(b == a + 1 for a, b in itertools.pairwise(orders[0]))
    assert neighbours < stream.epoch_rows / 4


def test_documents_and_positions_are_right_at_every_border(opened, words):
    stream = opened(words(20, longest=12), context_length=16, rows=2)
    for batch in batches(stream, stream.batches)[0]:
        for tokens, doc, pos in zip(batch.tokens.tolist(), batch.doc.tolist(), batch.pos.tolist()):
            assert doc[0] in (0, -1) and (doc[0] == -1 or pos[0] == 0)
            for t in range(1, 17):
                if doc[t] == -1:
                    assert tokens[t] == pos[t] == 0
                elif tokens[t - 1] == 256:
                    assert doc[t] == doc[t - 1] + 1 and pos[t] == 0
                else:
                    assert doc[t] == doc[t - 1] and pos[t] == pos[t - 1] + 1


def test_lanes_go_on_where_they_were(opened, words):
    stream = opened(words(25, longest=60), context_length=8, rows=3, lanes=True)
    read, _ = batches(stream, 3 * stream.batches)
    went_on = 0
    for step, (before, after) in enumerate(itertools.pairwise(read), 1):
        for lane in range(3):
            last, first = (
                (b.tokens[lane, t].item(), b.doc[lane, t].item(), b.pos[lane, t].item())
                for b, t in ((before, -1), (after, 0))
            )
            if step % stream.batches == 0:
                assert first[1] > before.doc[lane].max(), (
                    "an epoch's documents are not those of the epoch before"
                )
            elif first[1] >= 0:
                assert last == first
                went_on += first[2] > 0
    assert went_on > 10


def test_a_step_is_the_same_however_one_gets_there(opened, words):
    for lanes in (False, True):
        stream = opened(words(30), lanes=lanes)
        whole, _ = batches(stream, 40)
        for stop in (1, 7, 23):
            _, cursor = batches(stream, stop)
            again = opened(words(30), lanes=lanes)
            rest, _ = batches(again, 40 - stop, cursor)
            assert all(same(a, b) for a, b in zip(whole[stop:], rest))


def test_the_cursor_counts_rows_of_the_whole_run_and_nothing_else(opened, words):
    _, cursor = batches(opened(words(30)), 5)
    assert set(cursor) == {"rows", "fingerprint"} and cursor["rows"] == 10
    wide = opened(words(30), rows=4)
    batch, _ = wide.read(cursor)
    narrow, _ = batches(opened(words(30)), 2, cursor)
    assert batch.aims is None and same(
        batch[:4], [torch.cat(parts) for parts in zip(*(each[:4] for each in narrow))]
    )


def test_epochs_and_seeds_have_orders_of_their_own(opened, words):
    stream = opened(words(30), rows=1)
    read, _ = batches(stream, 2 * stream.epoch_rows)
    first, second = read[: stream.epoch_rows], read[stream.epoch_rows :]
    assert not all(same(a, b) for a, b in zip(first, second))
    other, _ = batches(opened(words(30), rows=1, seed=1), stream.epoch_rows)
    assert not all(same(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize(
    "change",
    [
        {"context_length": 4},
        {"seed": 1},
        {"lanes": True},
        {"data": {"held_out": 0.5}},
        {"split": "held_out"},
    ],
)
def test_a_cursor_of_other_rows_is_refused(opened, words, change):
    data = {"data": {"held_out": 0.3}}
    cursor = opened(words(30), **data).start()
    with pytest.raises(ValueError, match="belongs to other data"):
        opened(words(30), **(data | change)).read(cursor)


def test_a_cursor_of_other_documents_is_refused_but_the_data_may_move(
    opened, files, texts, words, tmp_path
):
    stream = opened(words(30))
    with pytest.raises(ValueError, match="set them back, or begin anew"):
        opened(words(31)).read(stream.start())
    (tmp_path / "moved").mkdir()
    moved = texts(words(30), "moved/data.jsonl")
    settings = {"context_length": 8, "rows": 2, "seed": 0}
    assert open_stream(files(moved), **settings).fingerprint == stream.fingerprint


def test_held_out_documents_are_not_trained_on_and_come_in_one_order(opened, words):
    found = words(40)
    data = {"held_out": 0.25}
    train = opened(found, data=data)
    held_out = [opened(found, data=data, split="held_out", seed=seed) for seed in (0, 1)]
    assert len(train.documents) + len(held_out[0].documents) == 40
    assert not set(train.documents) & set(held_out[0].documents)
    first, second = (batches(stream, stream.batches + 2)[0] for stream in held_out)
    assert all(same(a, b) for a, b in zip(first, second))
    assert (first[-1].doc == -1).all() and first[-1].predictions() == 0
    letters = sum(len(found[i].encode()) for i in held_out[0].documents)
    assert sum(batch.predictions() for batch in first) == letters, (
        "each token of a document but its first, and its end"
    )


def test_a_single_document_cannot_be_held_out(opened):
    with pytest.raises(ValueError, match="a single document cannot be both"):
        opened(["only one"], data={"held_out": 0.5}, split="held_out")
    assert len(opened(["only one"], data={"held_out": 0.5}).documents) == 1


def test_tiny_data_is_read_again_and_again_within_one_batch(opened):
    (batch,), _ = batches(opened(["ab"], context_length=16, rows=5), 1)
    assert batch.predictions() == 5 * 2
    (batch,), _ = batches(opened(["ab"], context_length=16, rows=5, lanes=True), 1)
    assert batch.predictions() == 2 and batch.tokens.shape == (5, 17)


def test_unicode_is_packed_by_bytes(opened):
    (batch,), _ = batches(opened(["\xe9\u4e16\U0001f642"], context_length=32, rows=1), 1)
    assert batch.tokens[0, :10].tolist() == [*"\xe9\u4e16\U0001f642".encode(), 256]
    assert batch.doc[0].tolist() == [0] * 10 + [-1] * 23


def test_the_log_is_told_what_there_is(opened, words):
    text = opened([*words(5), ""], rows=1).describe(steps=100)
    assert (
        "5 training documents" in text
        and "1 documents without text" in text
        and "100 steps read them" in text
    )


def test_evaluation_without_held_out_documents_is_refused_before_and_in_the_run(
    opened, files, texts
):
    with pytest.raises(ValueError, match="keeps no document for evaluation"):
        opened(["one", "two"], split="held_out")
    node = files(texts(["one", "two"]))
    assert check(node, evaluates=True) == [NONE_HELD_OUT] and check(node) == []


def test_the_check_sees_that_one_document_cannot_be_held_out(files, texts):
    node = files(texts(["one"]), held_out=0.1)
    for _ in range(2):  # from the file, then from the cache
        assert check(node, evaluates=True) == [ONE_DOCUMENT] and check(node) == []
        open_stream(node, context_length=4, rows=1, seed=0)
    assert check(files(texts(["one", "two"]), held_out=0.1), evaluates=True) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"data": {"held_out": 1.0}}, r"data\.held_out=1\.0 is no fraction"),
        ({"data": {"on_error": "ignore"}}, r"data\.on_error=ignore is unknown"),
        (
            {"data": {"text_filed": "x"}},
            r"data\.text_filed is not a setting of .* it takes path, held_out_path, text_field",
        ),
        ({"data": {"_target_": "trainer.data.none.None"}}, "cannot be imported"),
        ({"data": {"_target_": "trainer.data.batch.Batch"}}, "is no source of documents"),
        ({"data": {"cache": ""}}, "is no folder"),
        ({"data": {"tokenizer": 3}}, "names no tokenizer"),
        ({"rows": 0}, "rows=0 is no number of rows"),
        ({"context_length": True}, "context_length=True is no number of tokens"),
        ({"split": "test"}, "split=test is unknown"),
    ],
)
def test_a_wish_that_cannot_be_honoured_is_refused(opened, settings, message):
    with pytest.raises(ValueError, match=message):
        opened(["one"], **settings)


@pytest.mark.parametrize("name", ["stdlib", "files", "hub"])
def test_the_settings_on_offer_are_those_that_the_source_takes(name):
    node = yaml.safe_load(
        (Path(__file__).parents[4] / "conf" / "data" / f"{name}.yaml").read_text()
    )
    module, _, kind = node.pop("_target_").rpartition(".")
    taken = inspect.signature(getattr(importlib.import_module(module), kind)).parameters
    required = {"path", "name"}
    assert list(taken) == list(node)
    assert all(taken[key].default == value for key, value in node.items() if key not in required)


def test_the_standard_library_is_read_without_packages_of_others(tmp_path, monkeypatch):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "email").mkdir()
    for name, body in {
        "b.py": b"b",
        "a.py": b"",
        "email/c.py": b"c",
        "site-packages/d.py": b"d",
        "e.py": b"\xe9",
    }.items():
        (tmp_path / name).write_bytes(body)
    monkeypatch.setattr("trainer.data.sources.stdlib.sysconfig.get_path", lambda _: str(tmp_path))
    data = {"_target_": "trainer.data.sources.stdlib.Stdlib", "cache": str(tmp_path / "cache")}
    stream = open_stream(data, context_length=4, rows=1, seed=0)
    assert [stream.corpus.tokens(i, 0, 9)[0] for i in range(2)] == [ord("b"), ord("c")]
    assert "1 empty files, 1 files not in UTF-8" in stream.describe()
    with pytest.raises(ValueError, match=r"a\.py is empty"):
        open_stream(data | {"on_error": "raise"}, context_length=4, rows=1, seed=0)
