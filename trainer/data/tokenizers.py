"""Text to numbers and back: raw bytes, or any Hugging Face tokenizer by path or name."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer as Backend

# How known models call the token that ends a text; the first that the tokenizer has is taken.
ENDINGS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]", "<EOS>", "[SEP]")


class Tokenizer(Protocol):
    """What the data needs of a tokenizer; token numbers are below `vocabulary`."""

    vocabulary: int
    end_of_text: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray: ...

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


class Bytes:
    """One token a byte of UTF-8: no file, no training, any language.

    256 bytes and one more number, 256, that ends a document: a model must be able to say that a text is over, and no
    byte is free for it (a NUL may well occur in a text).
    """

    vocabulary = 257
    end_of_text = 256
    fingerprint = "bytes/1"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Bytes that are no UTF-8 (a character cut in two) are shown as U+FFFD; ends of documents are left out."""
        ids = np.asarray(ids, np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode("utf-8", "replace")


class HuggingFace:
    """A tokenizer of the `tokenizers` library.

    Text is never read as markup: a document that spells "<|endoftext|>" gets the tokens of those letters. Truncation,
    padding and added special tokens are switched off. Where the tokenizer names no end of text, one number is added.
    """

    def __init__(self, backend: Backend, ending: str | None = None):
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend = backend
        words = backend.get_vocab(with_added_tokens=True)
        known = [word for word in (ending, *ENDINGS) if word is not None and word in words]
        self.vocabulary = max(words.values(), default=-1) + 1  # not the number of words: there may be gaps
        if known:
            self.end_of_text = words[known[0]]
        else:
            self.end_of_text = self.vocabulary
            self.vocabulary += 1
        said = f"{backend.to_str()} {self.end_of_text}"
        self.fingerprint = "tokenizers/" + hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, np.uint32) for one in found]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = [int(i) for i in ids if 0 <= i != self.end_of_text]
        return self.backend.decode(ids, skip_special_tokens=True)


def load(name: str) -> Tokenizer:
    """The tokenizer of data.tokenizer: bytes, a tokenizer.json, a folder that holds one, or a name on the hub.

    Raises:
        ValueError: there is no such file, it is no tokenizer, or the hub has no such name or cannot be reached.
    """
    if name == "bytes":
        return Bytes()
    path = Path(name).expanduser()
    if path.is_dir() or path.is_file():
        return _local(name, path)
    if path.is_absolute() or path.suffix == ".json" or name.count("/") > 1 or name.startswith((".", "~")):
        raise ValueError(f"data.tokenizer={name}: there is no such file; give a tokenizer.json, a hub name, or bytes")
    try:
        return HuggingFace(Backend.from_pretrained(name))
    except Exception as error:  # the hub's own kinds of error differ from version to version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"data.tokenizer={name} is neither a file here nor a tokenizer that could be had from the Hugging Face hub "
            f"({reason}); give the path of a tokenizer.json, or bytes"
        ) from error


def _local(name: str, path: Path) -> HuggingFace:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"data.tokenizer={name}: the folder holds no tokenizer.json; save the tokenizer there first")
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"data.tokenizer={name}: {file} is no tokenizer ({error}); give a tokenizer.json") from error
    return HuggingFace(backend, _ending(file.with_name("tokenizer_config.json")))


def _ending(file: Path) -> str | None:
    """The word that a saved model's settings name as its end of text."""
    if not file.is_file():
        return None
    try:
        word = json.loads(file.read_text("utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not JSON settings of a tokenizer ({error}); mend or remove it") from error
    return word["content"] if isinstance(word, dict) else word
