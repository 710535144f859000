"""Bytes and Hugging Face tokenizers behind one interface."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.data.errors import DataError
from trainer.data.tokenizers import Bytes, HuggingFace, load

TEXT = "def f(x): return 'Gr\xfc\xdfe, \u4e16\u754c \U0001f642'\n"


def trained(path, specials=()):
    """A small byte-level BPE."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(specials), initial_alphabet=alphabet
    )
    found.train_from_iterator([TEXT * 20], trainer)
    found.enable_truncation(3)
    found.enable_padding(length=50)
    found.save(str(path))
    return path


def test_bytes_come_back_as_the_same_text():
    ids = Bytes().encode(TEXT)
    assert len(ids) == len(TEXT.encode()) and ids.max() < Bytes.end_of_text < Bytes.vocabulary
    assert Bytes().decode([*ids, Bytes.end_of_text]) == TEXT


def test_half_a_character_is_shown_and_not_an_error():
    assert Bytes().decode(list("\xe9".encode()[:1])) == "\ufffd"


def test_a_tokenizer_file_encodes_and_comes_back(tmp_path):
    found = load(str(trained(tmp_path / "tokenizer.json", ["<|endoftext|>"])))
    ids = found.encode(TEXT * 5)
    assert len(ids) > 50, "neither truncated nor padded, although the file asks for both"
    assert ids.max() < found.vocabulary and found.decode(ids) == TEXT * 5
    assert found.end_of_text == 0 and 0 not in ids
    assert found.decode([*ids, found.end_of_text]) == TEXT * 5
    assert all(
        (a == b).all()
        for a, b in zip(found.encode_many([TEXT, "x"]), [found.encode(TEXT), found.encode("x")])
    )


def test_markup_in_a_document_is_only_letters(tmp_path):
    found = load(str(trained(tmp_path / "tokenizer.json", ["<|endoftext|>"])))
    ids = found.encode("a<|endoftext|>b")
    assert found.end_of_text not in ids and found.decode(ids) == "a<|endoftext|>b"


def test_an_end_of_text_is_added_where_there_is_none(tmp_path):
    found = load(str(trained(tmp_path / "tokenizer.json")))
    assert found.end_of_text == found.vocabulary - 1
    assert found.encode(TEXT).max() < found.end_of_text
    assert found.decode(np.append(found.encode("x"), found.end_of_text)) == "x"


def test_a_folder_says_what_ends_a_text(tmp_path):
    trained(tmp_path / "tokenizer.json", ["<|endoftext|>", "<stop>"])
    assert load(str(tmp_path)).end_of_text == 0
    before = load(str(tmp_path)).fingerprint
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<stop>"}})
    )
    assert load(str(tmp_path)).end_of_text == 1
    assert load(str(tmp_path)).fingerprint != before


@pytest.mark.parametrize("name", ["missing/folder/tokenizer.json", "/nowhere/at/all", "./here"])
def test_a_path_that_is_none_is_refused_without_asking_the_hub(name):
    with pytest.raises(ValueError, match="there is no such file; give"):
        load(name)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer"):
        load(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        load(str(tmp_path))


def test_a_name_that_the_hub_cannot_give_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="neither a file here nor a tokenizer that could be had"):
        load("no-such-tokenizer-of-longspan")


def test_a_tokenizer_that_drops_merges_at_random_is_made_to_keep_them(tmp_path):
    path = trained(tmp_path / "tokenizer.json", ["<|endoftext|>"])
    plain = load(str(path))
    settings = json.loads(path.read_text())
    settings["model"]["dropout"] = 0.5
    path.write_text(json.dumps(settings))
    drops = load(str(path))
    assert all((drops.encode(TEXT * 3) == plain.encode(TEXT * 3)).all() for _ in range(5))
    assert drops.fingerprint == plain.fingerprint, "the same tokens are the same data"
    assert "dropout=0.5 is switched off" in drops.remark and not plain.remark


def test_a_tokenizer_that_samples_its_pieces_is_made_to_take_the_best():
    pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("ab", -1.1), ("aba", -1.2)]
    backend = Tokenizer(models.Unigram(pieces, 0))
    best = backend.encode("ab" * 20).ids
    backend.model.alpha = 0.5
    assert any(backend.encode("ab" * 20).ids != best for _ in range(20))
    chosen = HuggingFace(backend)
    assert (
        all(list(chosen.encode("ab" * 20)) == best for _ in range(20))
        and "alpha=0.5" in chosen.remark
    )


def word_level(path, words, **rest):
    model = {"type": "WordLevel", "vocab": words, "unk_token": "x"}
    path.write_text(json.dumps({"version": "1.0", "model": model, **rest}))
    return str(path)


@pytest.mark.parametrize("number", [4294967295, 30_000_000, 70_000])
def test_numbers_far_beyond_the_tokens_are_refused(tmp_path, number):
    name = word_level(tmp_path / "tokenizer.json", {"x": 0, "b": number})
    with pytest.raises(DataError, match=f"run up to {number}, but it has only 2 tokens"):
        load(name)


def test_small_gaps_among_the_numbers_are_none_of_our_business(tmp_path):
    assert load(word_level(tmp_path / "tokenizer.json", {"x": 0, "b": 1000})).vocabulary == 1002


def test_a_tokenizer_without_tokens_is_refused(tmp_path):
    with pytest.raises(DataError, match="it has no token"):
        load(word_level(tmp_path / "tokenizer.json", {}))


@pytest.mark.parametrize(
    "rest",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {
            "model": {
                "type": "BPE",
                "vocab": {"a": 0, "b": 3},
                "merges": [["a", "b"]],
                "continuing_subword_prefix": "###",
            }
        },
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "("},
                "behavior": "Isolated",
                "invert": False,
            }
        },
    ],
    ids=["panics", "a merge without its product", "a bad pattern"],
)
def test_what_the_library_cannot_read_is_a_message(tmp_path, rest, capfd):
    with pytest.raises(ValueError, match="is no tokenizer"):
        load(word_level(tmp_path / "tokenizer.json", {"x": 0, "b": 1}, **rest))
    assert not capfd.readouterr().err, "a panic tells the console nothing"


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 100_000, b"9" * 400])
def test_a_file_that_is_no_json_is_a_message(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="is no tokenizer"):
        load(str(tmp_path))


def test_a_file_beyond_the_limit_is_not_read(tmp_path, monkeypatch):
    trained(tmp_path / "tokenizer.json")
    monkeypatch.setattr("trainer.data.tokenizers.LARGEST_FILE", 100)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    "settings", ["[" * 100_000, "[]", '{"eos_token": 5}', '{"eos_token": {"content": [1]}}', "\0"]
)
def test_strange_settings_beside_a_tokenizer_are_a_message(tmp_path, settings):
    trained(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        load(str(tmp_path))


def test_a_text_that_the_tokenizer_cannot_encode_is_a_message(tmp_path):
    found = load(word_level(tmp_path / "tokenizer.json", {"a": 0, "b": 1}))
    with pytest.raises(DataError, match="cannot encode a text that begins 'zzz'"):
        found.encode_many(["a", "zzz", "b"])
