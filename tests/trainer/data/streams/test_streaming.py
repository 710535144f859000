"""Streamed data in lanes: the same documents, exact resume, held-out documents."""

import itertools
import json

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from models.loss import IGNORE
from trainer.data.open import check, open_stream
from trainer.data.streams import streaming


@pytest.fixture(autouse=True)
def without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def hub(tmp_path):
    """hub(texts, **settings): a data=hub node over a local folder of three Parquet files."""

    def make(found, field="text", **settings):
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        for shard in range(3):
            part = found[shard * len(found) // 3 : (shard + 1) * len(found) // 3]
            table = pa.table({field: pa.array(part, pa.string()), "other": list(range(len(part)))})
            parquet.write_table(
                table, folder / f"train-{shard:05d}-of-00003.parquet", row_group_size=16
            )
        return {
            "_target_": "trainer.data.sources.hub.Hub",
            "name": str(folder),
            "held_out": 0.0,
        } | settings

    return make


SHAPE = {"context_length": 8, "rows": 3, "seed": 0}


def read(stream, count, cursor=None):
    cursor, found = cursor or stream.start(), []
    for _ in range(count):
        batch, cursor = stream.read(json.loads(json.dumps(cursor)))
        found.append(batch)
    return found, cursor


def same(a, b):
    return all(torch.equal(x, y) if x is not None else y is None for x, y in zip(a, b, strict=True))


def spell(found, lane):
    """What a lane read, documents ended by a bar; every row's last token is the next one's
    first."""
    ids = [
        t for batch in found for t in batch.tokens[lane, :-1][batch.doc[lane, :-1] >= 0].tolist()
    ]
    return "".join(chr(i) if i < 256 else "|" for i in ids)


def test_document_i_goes_to_lane_i_modulo_rows_and_round_again(hub, words):
    texts = words(31, longest=20)
    found, _ = read(open_stream(hub(texts), **SHAPE), 60)
    for lane in range(3):
        dealt = "".join(text + "|" for text in (texts * 9)[lane::3])
        assert dealt.startswith(spell(found, lane)) and len(spell(found, lane)) == 60 * 8
        for before, after in itertools.pairwise(found):
            assert before.tokens[lane, -1] == after.tokens[lane, 0]


@pytest.mark.parametrize("lanes", [False, True])
def test_resume_is_exact_wherever_one_stops(hub, words, monkeypatch, lanes):
    monkeypatch.setattr(streaming, "SNAPSHOT", 4)
    node = hub(words(100))
    whole, _ = read(open_stream(node, **SHAPE, lanes=lanes), 120)
    stream = open_stream(node, **SHAPE, lanes=lanes)
    for stop in (1, 17, 50, 111):
        _, cursor = read(stream, stop)
        assert len(json.dumps(cursor)) < 2000
        rest, _ = read(open_stream(node, **SHAPE, lanes=lanes), 120 - stop, cursor)
        assert all(same(a, b) for a, b in zip(whole[stop:], rest))
        again, _ = read(stream, 2, cursor)
        assert same(again[0], whole[stop]), "a stream may go back to any cursor"


def test_resume_does_not_read_from_the_beginning(hub, words, monkeypatch):
    monkeypatch.setattr(streaming, "SNAPSHOT", 4)
    node = hub(words(100))
    _, cursor = read(open_stream(node, **SHAPE), 40)
    first = min(taken * 3 + lane for lane, (taken, _) in enumerate(cursor["lanes"]))
    assert first - 8 <= cursor["reader"]["dealt"] <= first and cursor["reader"]["state"] is not None
    assert cursor["reader"]["dealt"] > 30


def test_an_epochs_end_inside_a_stop_is_exact(hub, words):
    node = hub(words(7, longest=12))
    whole, _ = read(open_stream(node, **SHAPE), 30)
    for stop in (1, 2, 9, 16, 25):
        _, cursor = read(open_stream(node, **SHAPE), stop)
        rest, _ = read(open_stream(node, **SHAPE), 2, cursor)
        assert all(same(a, b) for a, b in zip(whole[stop:], rest))


def test_lanes_number_documents_and_positions_on(hub, words):
    found, _ = read(open_stream(hub(words(60, longest=60)), **SHAPE, lanes=True), 30)
    for before, after in itertools.pairwise(found):
        assert torch.equal(before.doc[:, -1], after.doc[:, 0]) and torch.equal(
            before.pos[:, -1], after.pos[:, 0]
        )
    assert found[-1].doc.min() > 0 and max(b.pos[:, 0].max() for b in found) > 8


def test_a_folder_of_json_lines_resumes_too(tmp_path, words, monkeypatch):
    monkeypatch.setattr(streaming, "SNAPSHOT", 4)
    (tmp_path / "set").mkdir()
    for shard in range(2):
        lines = [json.dumps({"body": text, "n": shard}) for text in words(60)[shard::2]]
        (tmp_path / "set" / f"train-{shard}.jsonl").write_text("\n".join(lines))
    node = {
        "_target_": "trainer.data.sources.hub.Hub",
        "name": str(tmp_path / "set"),
        "text_field": "body",
    }
    whole, _ = read(open_stream(node, **SHAPE), 70)
    for stop in (5, 33):
        _, cursor = read(open_stream(node, **SHAPE), stop)
        rest, _ = read(open_stream(node, **SHAPE), 70 - stop, cursor)
        assert all(same(a, b) for a, b in zip(whole[stop:], rest))
    assert "has no" in check(node | {"text_field": "text"})[0]


def test_rows_restart_a_cut_document(hub, words):
    found, _ = read(open_stream(hub(words(60, longest=60)), **SHAPE), 30)
    assert all((b.doc[:, 0] == 0).all() and (b.pos[:, 0] == 0).all() for b in found)


def test_held_out_documents_are_those_not_trained_on_read_once(hub):
    texts = [f"<{i}>" for i in range(90)]
    node = hub(texts, held_out=0.3)
    held_out, _ = read(open_stream(node, **SHAPE, split="held_out"), 60)
    train, _ = read(open_stream(node, **SHAPE), 100)
    out, kept = (
        {t for lane in range(3) for t in spell(found, lane).split("|") if t.endswith(">")}
        for found in (held_out, train)
    )
    out, kept = ({t for t in side if t.startswith("<")} for side in (out, kept))
    assert not out & kept and out | kept == set(texts) and 15 < len(out) < 40
    assert sum(b.predictions() for b in held_out) == sum(len(text) for text in out)
    assert (held_out[-1].doc == -1).all() and (held_out[-1].targets() == IGNORE).all()


def test_a_second_evaluation_reads_nothing(hub, words, monkeypatch):
    stream = open_stream(hub(words(60), held_out=0.5), **SHAPE, split="held_out")
    first, _ = read(stream, 4)
    monkeypatch.setattr(stream, "_deal", None)
    assert all(same(a, b) for a, b in zip(first, read(stream, 4)[0]))


def test_documents_without_text_are_left_out_and_counted(hub, words):
    texts = words(30)
    node = hub([*texts[:5], "", *texts[5:9], None, *texts[9:]], on_error="skip")
    stream = open_stream(node, **SHAPE)
    found, _ = read(stream, 12)
    for lane in range(3):
        assert "".join(text + "|" for text in texts[lane::3]).startswith(spell(found, lane))
    assert "1 rows without text, 1 documents without text" in stream.describe()


def test_a_null_text_ends_the_run_with_its_place(hub, words):
    node = hub([*words(9), None, *words(9)])
    with pytest.raises(
        ValueError, match=r"set/train-00001-of-00003\.parquet row 3: field 'text' is null; mend"
    ):
        read(open_stream(node, **SHAPE), 9)


def test_no_document_to_train_on_is_an_error_and_no_endless_search(hub):
    with pytest.raises(ValueError, match="has no text in the field 'text' of its first documents"):
        open_stream(hub(["", "", ""]), **SHAPE)
    with pytest.raises(ValueError, match="holds no document to train on"):
        read(open_stream(hub(["a", "b", "c"], held_out=0.9999999), **SHAPE), 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_field": "body"}, r"has no column 'body' \(it has: text, other\)"),
        ({"split": "tests"}, "cannot be had as a data set"),
        (
            {"name": "no-such/set-of-longspan"},
            "check the name, data.subset and data.split, or the network",
        ),
        ({"name": None}, "data=hub needs data.name"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_one_message(hub, words, change, message):
    node = hub(words(9), **change)
    with pytest.raises(ValueError, match=message):
        open_stream(node, **SHAPE)
    assert len(check(node)) == 1


def test_a_good_data_set_passes_the_check(hub, words):
    assert check(hub(words(9))) == []


def test_a_cursor_of_other_rows_is_refused(hub, words):
    cursor = open_stream(hub(words(30)), **SHAPE).start()
    for change in ({"rows": 2}, {"context_length": 4}, {"lanes": True}):
        with pytest.raises(ValueError, match="belongs to other data"):
            open_stream(hub(words(30)), **(SHAPE | change)).read(cursor)
    with pytest.raises(ValueError, match="belongs to other data"):
        open_stream(hub(["other", *words(30)]), **SHAPE).read(cursor)


def test_a_broken_shard_is_told_with_the_place(hub, words, tmp_path):
    node = hub(words(30))
    shard = sorted((tmp_path / "set").iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(
        ValueError,
        match=r"set/train-00001-of-00003\.parquet is not a whole Parquet file: at row 0: ",
    ):
        read(open_stream(node, **SHAPE), 99)
