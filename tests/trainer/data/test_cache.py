"""The token cache: built once, whole or not at all, and mended."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainer.data import corpus
from trainer.data.cache import corpus_of
from trainer.data.open import check, open_stream
from trainer.data.sources.base import build_source
from trainer.data.tokenizers import Bytes


def corpora(folder):
    return sorted(path for path in Path(folder).iterdir() if path.is_dir())


BUILDER = """
import json, logging, sys
from trainer.data.cache import corpus_of
from trainer.data.sources.files import Files

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("longspan.data").addHandler(handler)
logging.getLogger("longspan.data").setLevel(logging.INFO)
source = Files(**json.loads(sys.argv[1]))
tokenizer = source.tokenizer()
print("ready", flush=True)
sys.stdin.readline()
found = corpus_of(source, tokenizer)
times = sum(message.startswith("tokenising") for message in said)
print(times, found.facts["fingerprint"], "torch" in sys.modules)
"""


def test_processes_that_start_at_once_build_one_corpus(files, texts, words, tmp_path):
    node = files(texts(words(20000, longest=60)))
    node.pop("_target_")
    command = [sys.executable, "-c", BUILDER, json.dumps(node)]
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "cwd": Path(__file__).parents[3],
    }
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    found = [process.communicate(timeout=60)[0].split() for process in processes]
    assert sorted(built for built, _, _ in found) == ["0", "1"]
    assert len({fingerprint for _, fingerprint, _ in found}) == 1
    assert {torch for _, _, torch in found} == {"False"}, "building needs no torch"
    assert len(corpora(tmp_path / "cache")) == 1


def test_a_corpus_is_read_again_and_not_built_again(files, texts, words, monkeypatch):
    source = build_source(files(texts(words(10))))
    corpus_of(source, Bytes())
    monkeypatch.setattr("trainer.data.cache.write", None)
    assert corpus_of(source, Bytes()).facts["documents"] == 10


SPOIL = {
    "truncated tokens": lambda d: os.truncate(d / "tokens.arrow", 200),
    "no tokens": lambda d: (d / "tokens.arrow").unlink(),
    "empty tokens": lambda d: os.truncate(d / "tokens.arrow", 0),
    "facts are no JSON": lambda d: (d / "facts.json").write_text("{"),
    "facts of another": lambda d: (d / "facts.json").write_text('{"sums": []}'),
    "one token": lambda d: flip(d / "tokens.arrow"),
}


def flip(path):
    raw = bytearray(path.read_bytes())
    place = raw.index("needle".encode("utf-16-le"))
    raw[place] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", SPOIL)
def test_a_damaged_corpus_is_built_again_and_it_is_said(name, files, texts, tmp_path, caplog):
    source = build_source(files(texts(["hay", "needle"])))
    before = corpus_of(source, Bytes()).facts
    (folder,) = corpora(tmp_path / "cache")
    SPOIL[name](folder)
    with caplog.at_level(logging.WARNING, "longspan.data"):
        after = corpus_of(source, Bytes())
    assert "is damaged" in caplog.text and "built again" in caplog.text
    assert after.facts == before and Bytes().decode(after.tokens(1, 0, 99)) == "needle"


def test_damage_behind_what_is_looked_at_first_is_found_when_read(
    files, texts, tmp_path, monkeypatch
):
    source = build_source(files(texts(["hay", "needle"])))
    corpus_of(source, Bytes())
    (folder,) = corpora(tmp_path / "cache")
    flip(folder / "tokens.arrow")
    monkeypatch.setattr(corpus, "TRUSTED", 0)
    with pytest.raises(ValueError, match=r"is damaged .* remove it and run again"):
        corpus_of(source, Bytes()).tokens(0, 0, 2)


def test_a_build_that_fails_leaves_nothing_and_what_a_dead_one_left_is_swept(
    files, texts, tmp_path
):
    good = texts(["fine"])
    node = files(good)
    good.write_text('{"text": "fine"}\nbroken')
    with pytest.raises(ValueError, match=r"line 2"):
        open_stream(node, context_length=4, rows=1, seed=0)
    assert corpora(tmp_path / "cache") == []
    good.write_text('{"text": "fine"}\n')
    (folder,) = (corpus_of(build_source(node), Bytes()).folder,)
    shutil.rmtree(folder)
    folder.with_name(folder.name + ".part-123").mkdir()
    corpus_of(build_source(node), Bytes())
    assert corpora(tmp_path / "cache") == [folder]


def test_changed_files_and_other_settings_have_corpora_of_their_own(files, texts, tmp_path):
    path = texts(["one"])
    first = corpus_of(build_source(files(path)), Bytes())
    texts(["two!"])
    second = corpus_of(build_source(files(path)), Bytes())
    third = corpus_of(build_source(files(path, on_error="skip")), Bytes())
    assert len({first.folder, second.folder, third.folder}) == 3
    assert first.facts["fingerprint"] != second.facts["fingerprint"] == third.facts["fingerprint"]


def test_a_check_of_cached_data_reads_no_file(files, texts, monkeypatch):
    node = files(texts(["one"]))
    monkeypatch.setattr("trainer.data.open._look", lambda *_: (["looked"], 1))
    assert check(node) == ["looked"]
    corpus_of(build_source(node), Bytes())
    assert check(node) == []


def test_a_cache_that_cannot_be_written_is_one_message(files, texts, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot be written .* give a folder with data.cache"):
        corpus_of(build_source(files(texts(["one"]), cache=str(tmp_path / "taken"))), Bytes())


def test_the_users_cache_folder_is_the_default(files, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert (
        corpus_of(build_source(files(texts(["one"]), cache=None)), Bytes()).folder.parent
        == tmp_path / "xdg" / "longspan"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        corpus_of(build_source(files(texts(["one"]), cache=None)), Bytes()).folder.parent
        == tmp_path / ".cache/longspan"
    )


def test_blocks_join_without_a_seam(files, texts, words, monkeypatch, tmp_path):
    found = words(50)
    whole = corpus_of(build_source(files(texts(found))), Bytes())
    monkeypatch.setattr(corpus, "BLOCK", 100)
    monkeypatch.setattr(corpus, "TEXTS", 3)
    parts = corpus_of(build_source(files(texts(found), cache=str(tmp_path / "other"))), Bytes())
    assert len(parts.flats) > 5 and len(whole.flats) == 1
    assert (parts.hashes == whole.hashes).all() and (parts.lengths == whole.lengths).all()
    assert [Bytes().decode(parts.tokens(i, 0, 99)) for i in range(50)] == found
    assert parts.tokens(49, 1, 3).tolist() == whole.tokens(49, 1, 3).tolist()


class Renamed(Bytes):
    """Another tokenizer that happens to give the same numbers."""

    fingerprint = "renamed"


def test_another_tokenizer_has_a_corpus_and_a_fingerprint_of_its_own(files, texts):
    source = build_source(files(texts(["one"])))
    first, second = corpus_of(source, Bytes()), corpus_of(source, Renamed())
    assert (
        first.folder != second.folder and first.facts["fingerprint"] != second.facts["fingerprint"]
    )


class Wide(Bytes):
    """Bytes moved up to numbers that need more than two bytes."""

    vocabulary, end_of_text, fingerprint = 100_257, 100_256, "wide"

    def encode(self, text):
        return super().encode(text).astype(np.uint32) + 100_000


def test_large_vocabularies_are_stored_in_four_bytes(files, texts):
    found = corpus_of(build_source(files(texts(["az"]))), Wide())
    assert found.tokens(0, 0, 9).tolist() == [100_097, 100_122, 100_256]
    assert json.loads((found.folder / "facts.json").read_text())["vocabulary"] == 100_257
