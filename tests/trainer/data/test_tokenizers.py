"""Bytes and Hugging Face tokenizers behind one interface."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.data.tokenizers import Bytes, load

TEXT = "def f(x): return 'Gr\xfc\xdfe, \u4e16\u754c \U0001f642'\n"


def trained(path, specials=()):
    """A small byte-level BPE."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(specials), initial_alphabet=alphabet)
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
    assert all((a == b).all() for a, b in zip(found.encode_many([TEXT, "x"]), [found.encode(TEXT), found.encode("x")]))


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
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
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
