"""A data set's files read column by column: columns nobody asked for, packed files, spoilt ones,
and exact resume in each."""

import bz2
import gzip
import itertools
import json
import lzma
import zipfile

import pyarrow as pa
import pytest
from pyarrow import parquet

from trainer.data.errors import DataError, ReadReport
from trainer.data.open import check, open_stream
from trainer.data.sources.hub import Hub
from trainer.data.sources.rows import START, Rows
from trainer.data.streams import streaming

SHAPE = {"context_length": 8, "rows": 3, "seed": 0}


@pytest.fixture(autouse=True)
def without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def node(folder, **settings):
    return {
        "_target_": "trainer.data.sources.hub.Hub",
        "name": str(folder),
        "held_out": 0.0,
    } | settings


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def texts_of(folder, **settings):
    """All documents of a data set, those left out as None, and the report."""
    source = Hub(name=str(folder), **settings)
    report = ReadReport(settings.get("on_error", "raise"))
    return [text for _, text in source.texts(report)], report


def tables(folder, name, columns):
    parquet.write_table(pa.table(columns), folder / name)


def mixed_json(folder):
    for file, value in {"a": 1, "b": "s1", "c": {"deep": [1]}, "d": None}.items():
        (folder / f"{file}.jsonl").write_bytes(
            jsonl(*({"text": f"{file}{i}", "n": value} for i in range(40)))
        )
    (folder / "e.jsonl").write_bytes(
        jsonl({"n": 1, "text": "e0"}, {"text": "e1", "n": [2]}, {"m": 2, "text": "e2"})
    )


def mixed_tables(folder):
    tables(folder, "a.parquet", {"n": [1, 2], "text": ["a0", "a1"]})
    tables(folder, "b.parquet", {"text": pa.array(["b0"], pa.large_string()), "n": ["x"]})
    tables(folder, "c.parquet", {"m": [[1.0]], "text": pa.array(["c0"]).dictionary_encode()})


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_column_that_nobody_asked_for_may_be_anything(on_error, tmp_path):
    for make, wanted in ((mixed_json, 163), (mixed_tables, 4)):
        folder = tmp_path / make.__name__
        folder.mkdir()
        make(folder)
        texts, report = texts_of(folder, on_error=on_error)
        assert (
            len(texts) == wanted
            and None not in texts
            and texts == sorted(texts, key=lambda text: text[0])
        )
        assert report.text() == "" and check(node(folder, on_error=on_error)) == []
        open_stream(node(folder, on_error=on_error), **SHAPE)


def test_the_wanted_column_is_not_cast_and_a_row_of_another_type_is_a_fault_with_its_place(
    tmp_path,
):
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "one"}, {"text": 2}, {"text": "three"}))
    with pytest.raises(DataError, match=r"a\.jsonl line 2: field 'text' is not text but a number"):
        texts_of(tmp_path)
    texts, report = texts_of(tmp_path, on_error="skip")
    assert texts == ["one", None, "three"] and report.counts == {"lines without text": 1}


def test_comma_separated_values_with_a_column_that_changes_type(tmp_path):
    (tmp_path / "a.csv").write_text("text,n\nfirst,1\n")
    (tmp_path / "b.csv").write_text("text,n\nsecond,two\n")
    assert texts_of(tmp_path)[0] == ["first", "second"]


def packed(folder):
    """Files of every packing, of ten documents each."""

    def ten(name):
        return jsonl(*({"text": f"{name}{i}"} for i in range(10)))

    (folder / "a.jsonl.gz").write_bytes(gzip.compress(ten("a")))
    (folder / "b.jsonl.xz").write_bytes(lzma.compress(ten("b")))
    (folder / "c.jsonl.bz2").write_bytes(bz2.compress(ten("c")))
    (folder / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + ten("d").replace(b"\n", b"\r\n\n"))
    (folder / "e.json").write_text(
        json.dumps([{"text": f"e{i}", "n": i} for i in range(10)], indent=1)
    )
    with zipfile.ZipFile(folder / "f.jsonl.zip", "w") as archive:
        archive.writestr("x.jsonl", ten("f")[:60])
        archive.writestr("y.jsonl", ten("f")[60:])


def test_packed_files_are_read_and_resumed_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "SNAPSHOT", 1)
    packed(tmp_path)
    files = sorted(str(path) for path in tmp_path.iterdir())
    wanted = [f"{name}{i}" for name in "abcdef" for i in range(10)]

    def rows():
        return Rows(files, parquet=False, field="text", most=1 << 20)

    whole = rows()
    states = [whole.state_dict()]
    for example in whole:
        assert example["text"] == wanted[len(states) - 1]
        states.append(json.loads(json.dumps(whole.state_dict())))
    assert len(states) == len(wanted) + 1
    for stop in range(0, 61, 3):
        again = rows()
        again.load_state_dict(states[stop])
        assert [example["text"] for example in itertools.islice(again, 12)] == wanted[
            stop : stop + 12
        ]
    assert texts_of(tmp_path)[0] == wanted


@pytest.mark.parametrize("kind", ["gz", "xz", "parquet", "json", "utf8", "nothing"])
def test_a_spoilt_file_among_good_ones_is_one_message_or_counted(kind, tmp_path):
    good = jsonl(*({"text": f"{i} of many words, {i * 7919}"} for i in range(400)))
    if kind == "parquet":
        for name in "abc":
            tables(tmp_path, f"{name}.parquet", {"text": [name]})
        (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-30])
    elif kind == "json":
        (tmp_path / "a.json").write_text('[{"text": "a"}]')
        (tmp_path / "b.json").write_text('[{"text": "a"')
        (tmp_path / "c.json").write_text('[{"text": "c"}]')
    else:
        (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "a"}))
        (tmp_path / "c.jsonl").write_bytes(jsonl({"text": "c"}))
        spoilt = {
            "gz": gzip.compress(good)[:-300],
            "xz": lzma.compress(good)[:-300],
            "utf8": b'{"text": "\xff"}\n',
            "nothing": b"no",
        }
        (tmp_path / f"b.jsonl{'.' + kind if kind in ('gz', 'xz') else ''}").write_bytes(
            spoilt[kind]
        )
    with pytest.raises(DataError, match=r"/b\.") as error:
        texts_of(tmp_path)
    assert "row" in str(error.value) or "line" in str(error.value) or "not JSON" in str(error.value)
    texts, report = texts_of(tmp_path, on_error="skip")
    assert texts[0] == "a" and texts[-1] == "c" and texts.count(None) == 1 and report.left_out == 1


def test_files_that_are_no_part_of_a_data_set_are_counted_and_said(tmp_path):
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "a"}, {"text": "b"}))
    (tmp_path / "b.csv").write_text("text\nlost\n")
    (tmp_path / "c.jsonl").symlink_to("none")
    said = open_stream(node(tmp_path), **SHAPE).describe()
    assert "2 files that are no part of the data set" in said and "b.csv" in said
    assert "there is no split test" in check(node(tmp_path, split="test"))[0]


def test_the_place_saved_by_another_reader_is_refused(tmp_path):
    rows = Rows(["x"], parquet=False, field="text", most=9)
    for state in ({"examples_iterable": 3}, START | {"row": "3"}, {}):
        with pytest.raises(DataError, match="another version"):
            rows.load_state_dict(state)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "json"])
def test_documents_beyond_the_limit_are_refused_or_counted(kind, tmp_path):
    if kind == "parquet":
        parquet.write_table(
            pa.table({"text": ["a", "x" * 999, "b"]}), tmp_path / "a.parquet", row_group_size=1
        )
    elif kind == "json":
        (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 999}]))
        (tmp_path / "b.json").write_text('[{"text": "a"}, {"text": "b"}]')
    else:
        (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "a"}, {"text": "x" * 999}, {"text": "b"}))
    with pytest.raises(DataError, match=r"more than data\.max_document_bytes=200"):
        texts_of(tmp_path, max_document_bytes=200)
    texts, report = texts_of(tmp_path, max_document_bytes=200, on_error="skip")
    assert [text for text in texts if text] == ["a", "b"] and report.counts == {
        "documents too large": 1
    }
