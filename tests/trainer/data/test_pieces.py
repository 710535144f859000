"""Memory of reading: bounded by data.max_document_bytes, whatever the file; and what is left out is
said."""

import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from trainer.data.corpus import Corpus, write
from trainer.data.errors import ReadReport
from trainer.data.open import check, open_stream
from trainer.data.sources.files import file_at
from trainer.data.sources.parquet import cells, read_table
from trainer.data.sources.parquet_pages import pages
from trainer.data.sources.readers import ReadRequest, Unread, documents, lines, whole
from trainer.data.tokenizers import Bytes

SETTINGS = {"context_length": 8, "rows": 1, "seed": 0}
MIB = 1 << 20
READERS = {".txt": whole, ".jsonl": lines, ".parquet": read_table}


def columns(texts):
    return pa.table({"n": list(range(len(texts))), "text": pa.array(texts, pa.string())})


def long_line(path):
    with open(path, "wb") as out:
        out.write(b'{"text": "first"}\n{"text": "')
        for _ in range(100):
            out.write(b"x" * MIB)
        out.write(b'"}\n{"text": "last"}\n')


def long_text(path):
    with open(path, "wb") as out:
        out.truncate(1 << 34)


def by_dictionary(path):
    parquet.write_table(columns([None if i == 3 else "a" * (MIB // 2) for i in range(400)]), path)


def by_compression(path):
    parquet.write_table(
        columns(["a" * (100 * MIB)]), path, compression="zstd", use_dictionary=False
    )


def by_pages(path):
    """Rows of a large page each, behind many small ones."""
    texts = ["b"] * 3000 + [chr(97 + i) * (3 * MIB) for i in range(24)] * 2
    parquet.write_table(
        columns(texts),
        path,
        compression="zstd",
        use_dictionary=False,
        write_batch_size=1,
        data_page_size=4096,
    )


def by_prefixes(path):
    encoding = {"text": "DELTA_BYTE_ARRAY", "n": "PLAIN"}
    texts = ["a" * (MIB // 2) + str(i) for i in range(200)]
    parquet.write_table(columns(texts), path, use_dictionary=False, column_encoding=encoding)


CASES = {
    "a.jsonl": (long_line, 2, 1),
    "b.txt": (long_text, 0, 1),
    "c.parquet": (by_dictionary, 399, 1),
    "d.parquet": (by_compression, 0, 1),
    "e.parquet": (by_pages, 3048, 0),
    "f.parquet": (by_prefixes, 200, 0),
}
MEASURE = """
import resource, sys
from trainer.data.errors import ReadReport
from trainer.data.sources.readers import ReadRequest, documents
from trainer.data.sources.files import Files, file_at
report = ReadReport("skip")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
request = ReadRequest("text", report, None, int(sys.argv[2]))
count = sum(1 for _ in documents(file_at(sys.argv[1], "x"), request, Files.readers))
print(count, report.left_out, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", CASES)
def test_the_memory_of_reading_is_at_most_three_times_the_largest_piece(name, tmp_path):
    make, good, bad = CASES[name]
    if not os.fork():  # so that what the writing takes is nobody's peak
        make(tmp_path / name)
        os._exit(0)
    assert os.wait()[1] == 0
    most = 8 * MIB
    words = [sys.executable, "-c", MEASURE, str(tmp_path / name), str(most)]
    count, left_out, peak = map(int, subprocess.check_output(words, text=True).split())
    assert (count, left_out) == (good, bad)
    assert peak * 1024 < 3 * most, f"{peak >> 10} MiB"


def test_a_document_as_large_as_the_limit_is_read_and_one_byte_more_is_not(tmp_path, files):
    def read(name, content, most):
        (tmp_path / name).write_bytes(content)
        report = ReadReport("skip")
        reading = ReadRequest("text", report, None, most)
        return [
            text for _, text in documents(file_at(str(tmp_path / name), name), reading, READERS)
        ], report

    line = b'{"text": "abc"}'
    for most, good in ((len(line), True), (len(line) - 1, False)):
        for end in (b"\n", b""):
            texts, report = (
                read("a.jsonl", line + end + b'{"text":"z"}' + end, most)
                if end
                else read("a.jsonl", line, most)
            )
            assert ("abc" in texts) == good and report.left_out == (not good)
    for most, good in ((3, True), (2, False)):
        assert (read("a.txt", b"abc", most)[0] == ["abc"]) == good
        parquet.write_table(columns(["ab", "abc"]), tmp_path / "a.parquet")
        texts, report = read("a.parquet", (tmp_path / "a.parquet").read_bytes(), most)
        assert report.left_out == (0 if good else 1)
    node = files(tmp_path / "a.txt", max_document_bytes=2)
    (said,) = check(node)
    assert (
        "has 3 bytes, more than data.max_document_bytes=2" in said and "data.on_error=skip" in said
    )
    with pytest.raises(ValueError, match="max_document_bytes=2"):
        open_stream(node, **SETTINGS)
    assert "max_document_bytes=0" in check(files(tmp_path / "a.txt", max_document_bytes=0))[0]


def test_another_limit_is_another_corpus(tmp_path, files):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("abcdef")
    node = files(tmp_path / "*.txt", on_error="skip")
    assert len(open_stream(node, **SETTINGS).documents) == 2
    assert len(open_stream(node | {"max_document_bytes": 3}, **SETTINGS).documents) == 1


@pytest.mark.parametrize(
    "settings",
    [{}, {"data_page_version": "2.0"}, {"write_statistics": False}, {"compression": "none"}],
)
def test_pages_are_those_of_the_library(settings, tmp_path):
    texts = [f"{i} " * (i % 90) for i in range(5000)]
    parquet.write_table(
        columns(texts), tmp_path / "a.parquet", data_page_size=5000, row_group_size=2000, **settings
    )
    metadata = parquet.read_metadata(tmp_path / "a.parquet")
    with open(tmp_path / "a.parquet", "rb") as source:
        for number in range(3):
            chunk = metadata.row_group(number).column(1)
            within = pages(source, chunk)
            assert sum(page.values for page in within) == chunk.num_values and len(within) > 1
            assert sum(page.size for page in within) <= chunk.total_uncompressed_size


@pytest.mark.parametrize("first", [0, 1, 1999, 2000, 4100, 4999, 5000])
def test_reading_a_table_goes_on_at_any_row(first, tmp_path):
    texts = [f"text {i}" for i in range(5000)]
    parquet.write_table(columns(texts), tmp_path / "a.parquet", row_group_size=2000)
    with open(tmp_path / "a.parquet", "rb") as source:
        assert list(cells(source, "a", "text", MIB, first)) == list(enumerate(texts))[first:]


def test_a_parquet_file_spoilt_anywhere_gives_rows_or_one_fault_with_file_and_place(tmp_path):
    parquet.write_table(
        columns([f"text {i}" * 9 for i in range(300)]), tmp_path / "a.parquet", row_group_size=100
    )
    good = (tmp_path / "a.parquet").read_bytes()
    faults = 0
    for span in range(0, len(good), 29):
        (tmp_path / "b.parquet").write_bytes(
            good[:span] + bytes([good[span] ^ 255]) + good[span + 1 :]
        )
        with open(tmp_path / "b.parquet", "rb") as source:
            for cell in cells(source, "b.parquet", "text", MIB):
                if isinstance(cell.text, Unread):
                    faults += 1
                    assert "b.parquet" in cell.text.message and "\n" not in cell.text.message
    assert faults > 20


@pytest.fixture
def odd(tmp_path):
    """A folder of one good file, and names that match and are none."""
    inside = tmp_path / "in"
    (inside / "folder.txt").mkdir(parents=True)
    (inside / "good.txt").write_text("good")
    (inside / "nowhere.txt").symlink_to("none")
    (inside / "circle.txt").symlink_to("circle.txt")
    os.mkfifo(inside / "pipe.txt")
    return inside


def test_names_that_match_and_are_left_out_are_counted_and_said_with_the_reason(odd, files):
    stream = open_stream(files(odd / "*.txt", on_error="skip"), **SETTINGS)
    assert stream.report.counts == {"unreadable files": 3, "folders": 1}
    said = " ".join(stream.report.examples)
    assert "folder.txt is a folder" in said and "a link to nothing" in said and "pipe" in said
    assert "left out 1 folders, 3 unreadable files" in stream.describe()
    node = files(odd / "*.txt")
    (said,) = check(node)
    assert "circle.txt and 2 more, which cannot be read" in said and "data.on_error=skip" in said
    for name in ("nowhere.txt", "circle.txt", "pipe.txt"):
        (odd / name).unlink()
    assert check(node) == [] and open_stream(node, **SETTINGS).report.counts == {"folders": 1}
    (odd / "good.txt").unlink()
    assert "matches 1 folders and no file" in check(node)[0]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path, files, monkeypatch):
    for name in ("a", "b", "b/c"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "x.txt").write_text("x")
    listed = os.scandir

    def scandir(path="."):
        if str(path).rstrip("/").endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for pattern in ("*/*.txt", "**/*.txt", "b/*.txt"):
        (said,) = check(files(tmp_path / "in" / pattern))
        assert "/in/b" in said and "Permission denied" in said
    stream = open_stream(files(tmp_path / "in" / "**" / "*.txt", on_error="skip"), **SETTINGS)
    assert stream.report.counts["unreadable files"] == 1


def test_a_file_that_fails_in_the_middle_is_said_with_file_and_place(tmp_path, files, monkeypatch):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": str(i)}) + "\n" for i in range(9))
    )
    whole_file = json.loads

    def broken(text, **settings):
        if "5" in text:
            raise OSError(5, "Input/output error")
        return whole_file(text, **settings)

    monkeypatch.setattr("trainer.data.sources.readers.json.loads", broken)
    with pytest.raises(
        ValueError, match=r"a\.jsonl cannot be read behind 5 \(Input/output error\)"
    ):
        open_stream(files(tmp_path / "a.jsonl"), **SETTINGS)


def test_fields_that_nobody_asked_for_may_hold_anything(tmp_path, files):
    rows = [
        b'{"n": 1, "text": "a"}',
        b'{"n": "one", "text": "b"}',
        b'{"n": ' + b"9" * 6000 + b', "text": "c"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*rows, b'{"n": [NaN, 1e999], "text": "d"}']))
    assert len(open_stream(files(tmp_path / "a.jsonl"), **SETTINGS).documents) == 4
    (tmp_path / "b.jsonl").write_bytes(b'{"text": 12}\n')
    assert "field 'text' is not text but a number" in check(files(tmp_path / "b.jsonl"))[0]


@pytest.mark.parametrize("letters", ["abc ", "aé\u20ac\U0001f600"])
def test_a_long_text_has_the_tokens_of_its_bytes_in_at_most_three_times_its_memory(
    letters, tmp_path, monkeypatch
):
    text = (letters * (1 << 20))[: (3 << 20) + 7]
    ids = Bytes().encode(text)
    assert ids.astype(np.uint8).tobytes() == text.encode() and ids.dtype == np.uint16
    monkeypatch.setattr("trainer.data.corpus.BLOCK", 1 << 20)
    named = [("a", "short"), ("b", text), ("c", "x" * (1 << 20)), ("d", "end")]
    write(tmp_path, iter(named[:1]), Bytes(), ReadReport())  # what the libraries take once
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    facts = write(tmp_path, iter(named), Bytes(), ReadReport())
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    corpus = Corpus(tmp_path)
    stored = [corpus.tokens(number, 0, 1 << 30) for number in range(4)]
    for (_, wanted), tokens in zip(named, stored):
        assert tokens[-1] == 256 and tokens[:-1].astype(np.uint8).tobytes() == wanted.encode()
    # Beside the text itself: two bytes for each token, and pieces of it (of four bytes a character
    # at most).
    assert peak < 2 * len(ids) + (8 << 20)
