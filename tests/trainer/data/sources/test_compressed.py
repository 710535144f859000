"""Compressed lines of JSON and saved data sets: the same documents, bounded, and faults told."""

import gzip
import json

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from trainer.data.errors import ReadReport
from trainer.data.open import check, open_stream
from trainer.data.sources.arrow import arrow_cells
from trainer.data.sources.files import Files, file_at
from trainer.data.sources.readers import ReadRequest, documents, suffix_of

SETTINGS = {"context_length": 8, "rows": 1, "seed": 0}
TEXTS = ["alpha", "beta \u00e9", "gamma" * 400]


def packed(path, raw):
    """Writes bytes as the suffix says: two members of gzip, one frame of zstd."""
    if path.suffix == ".gz":
        half = len(raw) // 2
        path.write_bytes(gzip.compress(raw[:half]) + gzip.compress(raw[half:]))
    else:
        path.write_bytes(bytes(pa.compress(raw, "zstd", asbytes=True)))
    return path


def rows(texts=TEXTS):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def read(path, **settings):
    """(documents, report) of one file."""
    report = ReadReport("skip")
    request = ReadRequest("text", report, **settings)
    found = documents(file_at(str(path), path.name), request, Files.readers)
    return [text for _, text in found], report


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_lines_are_those_of_the_plain_file(suffix, tmp_path):
    found, report = read(packed(tmp_path / f"a.jsonl{suffix}", rows()))
    assert found == TEXTS and not report.left_out
    assert suffix_of(f"x.JSONL{suffix.upper()}") == f".jsonl{suffix}"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_is_cut_off_is_a_fault_behind_its_whole_lines(suffix, tmp_path):
    whole = packed(tmp_path / f"a.jsonl{suffix}", rows([str(n) * 50 for n in range(9000)]))
    whole.write_bytes(whole.read_bytes()[:-30])
    found, report = read(whole)
    assert report.counts == {"unreadable files": 1}
    assert found == [str(n) * 50 for n in range(len(found))]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_line_that_unfolds_beyond_the_limit_is_passed_over_in_pieces(suffix, tmp_path):
    path = packed(tmp_path / f"a.jsonl{suffix}", rows(["x" * (40 << 20), "short"]))
    assert path.stat().st_size < 1 << 20
    before = pa.total_allocated_bytes()
    found, report = read(path, most=1000)
    assert found == ["short"] and report.counts == {"documents too large": 1}
    assert pa.total_allocated_bytes() - before < 8 << 20


def test_a_quick_look_ends_in_a_compressed_file_though_it_is_small(files, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.open.LOOK", 5000)
    packed(tmp_path / "a.jsonl.gz", rows(["a" * 4000] * 3))
    packed(tmp_path / "b.jsonl.gz", b"broken\n")
    assert check(files(tmp_path / "*.gz")) == []
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        open_stream(files(tmp_path / "*.gz"), **SETTINGS)


def test_a_saved_data_set_gives_its_rows_in_order(files, tmp_path):
    columns = {"other": [1, 2, 3], "text": TEXTS, "more": [["x"]] * 3}
    Dataset.from_dict(columns).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    stream = open_stream(files(tmp_path / "saved"), **SETTINGS)
    stored = [stream.corpus.tokens(i, 0, 9999) for i in range(3)]
    assert [stream.tokenizer.decode(ids) for ids in stored] == TEXTS


def test_of_several_saved_data_sets_one_is_to_be_named(files, tmp_path):
    data = Dataset.from_dict({"text": TEXTS})
    DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "both"))
    (message,) = check(files(tmp_path / "both"))
    assert "holds the splits train, test" in message and "both/train" in message
    assert check(files(tmp_path / "both" / "train")) == []


@pytest.mark.parametrize(
    "state, message",
    [
        ({"_data_files": [{"filename": "../a.arrow"}]}, "does not list the files within it"),
        ({"_data_files": []}, "does not list the files within it"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "cannot be read (No such file"),
        ({"_indices_data_files": [{"filename": "i.arrow"}]}, "flatten_indices()"),
        ("no object", "does not list the files"),
    ],
)
def test_a_saved_data_set_that_cannot_be_used_is_one_message(files, tmp_path, state, message):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    (found,) = check(files(tmp_path / "saved"))
    assert message in found and "data.path=" in found


def stream_file(path, table, compression=None):
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema, options=options) as out,
    ):
        out.write_table(table, max_chunksize=2)
    return path


def test_faults_of_an_arrow_file_are_told_and_the_rest_is_read(tmp_path):
    column = pa.array([b"good", b"\xff", None, b"long" * 9, b"last"]).view(pa.string())
    path = stream_file(tmp_path / "a.arrow", pa.table({"text": column}))
    found, report = read(path, most=20)
    assert found == ["good", "last"]
    assert report.counts == {
        "rows not in UTF-8": 1,
        "rows without text": 1,
        "documents too large": 1,
    }
    (first,) = read(stream_file(tmp_path / "b.arrow", pa.table({"body": ["x"]})))[1].examples
    assert "has no column 'text' (it has: body)" in first


def test_compressed_or_damaged_bodies_are_refused_before_they_are_used(tmp_path):
    table = pa.table({"text": ["a" * 5000] * 4})
    squeezed = stream_file(tmp_path / "a.arrow", table, "zstd")
    ((_, fault),) = arrow_cells(str(squeezed), "text", 1 << 20)
    assert "its bodies are compressed" in fault.message
    plain = stream_file(tmp_path / "b.arrow", pa.table({"text": ["abcd", "efgh"]}))
    raw = plain.read_bytes()
    offsets = raw.index(bytes([0, 0, 0, 0, 4, 0, 0, 0, 8, 0, 0, 0]))
    # The end of the first text, which no summary of the batch shows.
    plain.write_bytes(raw[: offsets + 4] + b"\xff\xff\xff\x7f" + raw[offsets + 8 :])
    ((_, fault),) = arrow_cells(str(plain), "text", 1 << 20)
    assert "is not a whole Arrow stream" in fault.message


def test_held_out_documents_may_be_files_of_their_own(files, texts):
    train = texts(["aaaa", "bbbb", "cccc"])
    other = texts(["xx", "yyy"], "other.jsonl")
    node = files(train, held_out=0.5, held_out_path=str(other))
    streams = [open_stream(node, split=split, **SETTINGS) for split in ("train", "held_out")]
    assert [len(stream.documents) for stream in streams] == [3, 2]
    assert streams[0].fingerprint != streams[1].fingerprint
    batch, _ = streams[1].read(streams[1].start())
    assert "xx" in streams[1].tokenizer.decode(batch.tokens[0])
    assert check(node, evaluates=True) == []


def test_held_out_files_are_checked_too_and_never_trained_on(files, texts):
    train = texts(["aaaa", "bbbb"])
    absent = check(files(train, held_out_path="none/*.jsonl"), evaluates=True)
    assert "data.held_out_path=none/*.jsonl matches no file" in absent[0]
    (shared,) = check(files(train, held_out_path=str(train)), evaluates=True)
    assert "which data.path=" in shared and "narrow one" in shared
