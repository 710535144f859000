"""Faults of files: one clear message each, or counted."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from trainer.data.open import check, open_stream

SETTINGS = {"context_length": 8, "rows": 1, "seed": 0}


def lines(path, *found):
    path.write_bytes(b"\n".join(found) + b"\n")
    return path


def table(path, columns):
    parquet.write_table(pa.table(columns), path)
    return path


FAULTS = {
    "jsonl line": (
        lambda d: lines(d / "a.jsonl", b'{"text": "fine"}', b'{"text": '),
        r"a\.jsonl line 2 is not JSON",
    ),
    "jsonl kind": (
        lambda d: lines(d / "a.jsonl", b'["x"]'),
        r"a\.jsonl line 1 is not a JSON object but list",
    ),
    "jsonl field": (
        lambda d: lines(d / "a.jsonl", b'{"body": "x"}'),
        r"line 1 has no field 'text' \(it has: body\)",
    ),
    "jsonl null": (
        lambda d: lines(d / "a.jsonl", b'{"text": null}'),
        r"line 1: field 'text' is not text but NoneType",
    ),
    "jsonl utf8": (
        lambda d: lines(d / "a.jsonl", b'{"text": "fine"}', b'{"text": "\xff"}'),
        r"line 2 is not UTF-8 text at byte 27",
    ),
    "jsonl surrogate": (
        lambda d: lines(d / "a.jsonl", b'{"text": "\\ud800"}'),
        r"line 1: .* half a surrogate pair",
    ),
    "text utf8": (
        lambda d: (d / "a.txt").write_bytes(b"abc\xe9d"),
        r"a\.txt is not UTF-8 text at byte 3",
    ),
    "text cut": (
        lambda d: (d / "a.txt").write_bytes("abc\xe9".encode()[:-1]),
        r"a\.txt is not UTF-8 text at byte 3",
    ),
    "empty": (lambda d: (d / "a.txt").touch(), r"a\.txt is empty \(0 bytes\)"),
    "parquet column": (
        lambda d: table(d / "a.parquet", {"body": ["x"]}),
        r"no column 'text' \(it has: body\)",
    ),
    "parquet kind": (
        lambda d: table(d / "a.parquet", {"text": [1]}),
        r"column 'text' is not text but int64",
    ),
    "parquet null": (
        lambda d: table(d / "a.parquet", {"text": ["x", None]}),
        r"a\.parquet row 1: field 'text' is null",
    ),
    "parquet corrupt": (
        lambda d: (d / "a.parquet").write_bytes(b"PAR1 nothing"),
        r"a\.parquet is not a whole Parquet",
    ),
    "suffix": (
        lambda d: (d / "a.csv").write_text("x"),
        r"matches .*a\.csv; data=files reads \.txt, \.jsonl, .*\.parquet",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_message_with_a_way_out(name, files, tmp_path):
    (tmp_path / "in").mkdir()
    write, message = FAULTS[name]
    write(tmp_path / "in")
    node = files(tmp_path / "in" / "*")
    with pytest.raises(ValueError, match=message):
        open_stream(node, **SETTINGS)
    (found,) = check(node)
    assert "narrow the glob" in found or "data.on_error=skip" in found


@pytest.mark.parametrize("name", FAULTS)
def test_skipping_counts_the_fault_and_reads_the_rest(name, files, tmp_path):
    (tmp_path / "in").mkdir()
    FAULTS[name][0](tmp_path / "in")
    node = files(tmp_path / "in" / "*", on_error="skip")
    alone = name not in ("jsonl line", "jsonl utf8", "parquet null")
    if alone:
        with pytest.raises(ValueError, match="no document is left of 1 files"):
            open_stream(node, **SETTINGS)
        assert "no document is left" in check(node)[0]
    (tmp_path / "in" / "z.txt").write_text("good")
    assert check(node) == []
    stream = open_stream(node, **SETTINGS)
    assert stream.report.left_out == 1 and "left out 1 " in stream.describe()
    assert len(stream.documents) == (1 if alone else 2)


def test_every_kind_of_file_gives_its_documents_in_order(files, tmp_path):
    table(
        tmp_path / "c.parquet", {"text": pa.array(["p0", "p1"], pa.large_string()), "other": [1, 2]}
    )
    lines(tmp_path / "b.jsonl", b'\xef\xbb\xbf{"text": "j1"}', b"", b'{"text": "j3", "n": 1}')
    (tmp_path / "a.txt").write_text("t\r\nx", newline="")
    stream = open_stream(files(tmp_path / "?.*"), **SETTINGS)
    stored = [stream.corpus.tokens(i, 0, 99) for i in range(5)]
    assert [stream.tokenizer.decode(ids) for ids in stored] == ["t\r\nx", "j1", "j3", "p0", "p1"]
    assert all(ids[-1] == 256 for ids in stored)


def test_another_field_holds_the_text(files, tmp_path):
    lines(tmp_path / "a.jsonl", json.dumps({"body": "here", "text": "not here"}).encode())
    stream = open_stream(files(tmp_path / "a.jsonl", text_field="body"), **SETTINGS)
    assert stream.tokenizer.decode(stream.corpus.tokens(0, 0, 99)) == "here"


def test_empty_documents_are_counted_and_no_fault(files, texts):
    stream = open_stream(files(texts(["", "a", ""])), **SETTINGS)
    assert len(stream.documents) == 1 and stream.report.empty == 2


@pytest.mark.parametrize(
    "path, message",
    [
        ("none/*.txt", "matches no file"),
        (".", "is a folder; give a glob"),
        (None, "needs data.path"),
    ],
)
def test_a_glob_that_finds_nothing_is_refused(files, tmp_path, path, message):
    node = files(tmp_path / path) if path else files("x") | {"path": None}
    assert len(check(node)) == 1 and message in check(node)[0]
    with pytest.raises(ValueError, match=message):
        open_stream(node, **SETTINGS)


def test_the_check_collects_faults_and_the_tokenizer_too(files, tmp_path):
    lines(tmp_path / "a.jsonl", *[b"no"] * 9)
    found = check(files(tmp_path / "a.jsonl", tokenizer="./none.json"))
    assert "no such file" in found[0] and "line 1 " in found[1] and "line 5 " in found[5]
    assert found[6] == "and 4 more faults of the data" and len(found) == 7


def test_the_check_stops_looking_but_the_reading_does_not(files, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.open.LOOK", 100)
    lines(tmp_path / "a.jsonl", *[b'{"text": "0123456789"}'] * 9, b"broken")
    node = files(tmp_path / "[ab].*")
    assert check(node) == []
    with pytest.raises(ValueError, match="line 10 is not JSON"):
        open_stream(node, **SETTINGS)


@pytest.mark.parametrize("limit", [3, 4])
def test_a_look_may_end_inside_a_character(files, tmp_path, monkeypatch, limit):
    monkeypatch.setattr("trainer.data.open.LOOK", limit)
    (tmp_path / "a.txt").write_bytes("\xe9\xe9\xe9\xe9".encode())
    assert check(files(tmp_path / "a.txt")) == []
