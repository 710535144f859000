"""Text to numbers and back: raw bytes, or any Hugging Face tokenizer by path or name."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer as Backend

from trainer.data.errors import DataError
from trainer.data.tokenizer_settings import TokenizerSettings, read_settings

# How known models call the token that ends a text; the first that the tokenizer has is taken.
ENDINGS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "[EOS]",
    "<EOS>",
    "[SEP]",
)
# Settings by which a model of the library draws at random how it cuts a text: BPE's dropout, and
# Unigram's sampling.
RANDOM_SETTINGS = ("dropout", "alpha", "nbest_size")
LARGEST_FILE = 256 << 20  # bytes of a tokenizer.json; the largest that are in use have some 40 MB
LARGEST_GAP = 1 << 16  # numbers that no token has, beyond as many as there are tokens
SHOWN = 60  # characters of a text that a message quotes
PIECE = 1 << 18  # characters of a long text that are turned to bytes at a time


class Tokenizer(Protocol):
    """Interface of tokenizers; token numbers are below `vocabulary`.

    Attributes:
        vocabulary: rows that a model has for the tokens, further ones for padding included.
        tokens: numbers below it are tokens; less than `vocabulary` where that is padded.
        end_of_text: the number that ends a document.
    """

    vocabulary: int
    tokens: int
    end_of_text: int
    fingerprint: str
    remark: str  # for the log: what of its settings does not count here; empty where all do

    def encode(self, text: str) -> np.ndarray: ...

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


class ChatTokenizer(Tokenizer, Protocol):
    """A tokenizer that can read the text of a chat template.

    Attributes:
        settings: special tokens and chat templates.
        endings: texts of its special tokens.
    """

    settings: TokenizerSettings
    endings: tuple[str, ...]

    def encode_markup(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of a text, special ones where it spells them.

        Returns:
            (token numbers [n], place in the text where each begins [n]).
        """
        ...


class Bytes:
    """One token a byte of UTF-8: no file, no training, any language.

    256 bytes and one more number, 256, that ends a document: a model must be able to say that a
    text is over, and no byte is free for it (a NUL may well occur in a text).
    """

    vocabulary = 257
    tokens = 257
    end_of_text = 256
    fingerprint = "bytes/1"
    remark = ""
    settings = TokenizerSettings()
    endings = ()

    def encode(self, text: str) -> np.ndarray:
        if len(text) <= PIECE:
            return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)
        size = (
            len(text)
            if text.isascii()
            else sum(len(piece.encode("utf-8")) for piece in _pieces(text))
        )
        ids = np.empty(size, np.uint16)
        end = 0
        for piece in _pieces(text):
            raw = np.frombuffer(piece.encode("utf-8"), np.uint8)
            ids[end : end + len(raw)] = raw
            end += len(raw)
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_markup(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """See ChatTokenizer.encode_markup; no byte is special."""
        widths = [len(character.encode("utf-8")) for character in text]
        return self.encode(text), np.repeat(np.arange(len(text)), widths)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Bytes that are no UTF-8 (a character cut in two) are shown as U+FFFD; ends of documents
        are left out."""
        ids = np.asarray(ids, np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode("utf-8", "replace")


class HuggingFace:
    """A tokenizer of the `tokenizers` library.

    Text is never read as markup: a document that spells "<|endoftext|>" gets the tokens of those
    letters. Truncation, padding, added special tokens and whatever is drawn at random are switched
    off: every rank tokenises for itself, and all must read the same. Where the tokenizer names no
    end of text, one number is added.

    Args:
        backend: the library's tokenizer; it is changed.
        settings: special tokens, of which eos_token ends a text, and chat templates.
        name: what messages call it.

    Raises:
        DataError: its numbers run far beyond its tokens, or it has none.
    """

    def __init__(
        self,
        backend: Backend,
        settings: TokenizerSettings | None = None,
        name: str = "tokenizer",
    ):
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.remark = _without_chance(backend)
        self.backend = backend
        self.name = name
        self.settings = TokenizerSettings() if settings is None else settings
        added = backend.get_added_tokens_decoder().values()
        self.endings = tuple(token.content for token in added if token.special)
        words = backend.get_vocab(with_added_tokens=True)
        known = [
            word
            for word in (self.settings.special.get("eos_token"), *ENDINGS)
            if word is not None and word in words
        ]
        self.vocabulary = (
            max(words.values(), default=-1) + 1
        )  # not the number of words: there may be gaps
        if not words:
            raise DataError(f"data.tokenizer={name}: it has no token; give another, or bytes")
        if self.vocabulary > 2 * len(words) + LARGEST_GAP:
            raise DataError(
                f"data.tokenizer={name}: its numbers run up to {self.vocabulary - 1}, but it has"
                f" only {len(words)} tokens, and a model has a row for every number up to the last"
                f" (at most {LARGEST_GAP} more than twice the tokens are allowed); number its"
                " tokens without gaps"
            )
        if known:
            self.end_of_text = words[known[0]]
        else:
            self.end_of_text = self.vocabulary
            self.vocabulary += 1
        self.tokens = self.vocabulary
        said = f"{backend.to_str()} {self.end_of_text}"
        self.fingerprint = (
            "tokenizers/" + hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
        )

    def number(self, word: str) -> int | None:
        """The number of a word that is one token, a special one too; None where there is no such
        token."""
        return self.backend.token_to_id(word)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token numbers of each text. Raises DataError where the tokenizer has none for a text."""
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:
            raise self._refused(texts, error) from error
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def encode_markup(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """See ChatTokenizer.encode_markup."""
        self.backend.encode_special_tokens = False
        try:
            encoding = self.backend.encode(text, add_special_tokens=False)
        except BaseException as error:
            raise self._refused([text], error) from error
        finally:
            self.backend.encode_special_tokens = True
        begins = [begin for begin, _ in encoding.offsets]
        return np.asarray(encoding.ids, np.uint32), np.asarray(begins, np.int64)

    def _refused(self, texts: Sequence[str], error: BaseException) -> BaseException:
        """The fault of the first text that cannot be encoded; `error` itself where that is not the
        library's."""
        if not _of_library(error):
            return error
        culprit = texts[0]
        for text in texts:
            try:
                self.backend.encode_batch_fast([text], add_special_tokens=False)
            except BaseException as again:
                if not _of_library(again):
                    return again
                culprit = text
                break
        return DataError(
            f"data.tokenizer={self.name} cannot encode a text that begins {culprit[:SHOWN]!r}"
            f" ({_first_line(error)}); give a tokenizer that has a number for every text, such as"
            " one of bytes"
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = [int(i) for i in ids if 0 <= i != self.end_of_text]
        return self.backend.decode(ids, skip_special_tokens=True)


def padded_to(tokenizer: Tokenizer, multiple: int) -> Tokenizer:
    """Raises a tokenizer's vocabulary to a multiple, and says so in its remark.

    The further numbers are never read; matrices of such a size are what kernels like.
    """
    tokens = tokenizer.tokens
    tokenizer.vocabulary = -(-tokens // multiple) * multiple
    if tokenizer.vocabulary > tokens:
        words = f"vocabulary {tokens} padded to {tokenizer.vocabulary}, a multiple of {multiple}"
        tokenizer.remark = "; ".join(part for part in (tokenizer.remark, words) if part)
    return tokenizer


def ended(tokens: np.ndarray, end: int) -> np.ndarray:
    """The tokens with the end of text behind them, in the memory that they have, where it is their
    own."""
    if not tokens.flags.owndata or not tokens.flags.writeable:
        tokens = tokens.copy()
    tokens.resize(len(tokens) + 1, refcheck=False)
    tokens[-1] = end
    return tokens


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def load(name: str) -> Tokenizer:
    """The tokenizer of data.tokenizer: bytes, a tokenizer.json, a folder that holds one, or a name
    on the hub.

    Raises:
        ValueError: there is no such file, it is no tokenizer, or the hub has no such name or cannot
            be reached.
    """
    if name == "bytes":
        return Bytes()
    path = Path(os.path.expanduser(name))
    if path.is_dir() or path.is_file():
        return _local(name, path)
    if (
        path.is_absolute()
        or path.suffix == ".json"
        or name.count("/") > 1
        or name.startswith((".", "~"))
    ):
        raise ValueError(
            f"data.tokenizer={name}: there is no such file; give a tokenizer.json, a hub name, or"
            " bytes"
        )
    try:
        backend = Backend.from_pretrained(name)
    except BaseException as error:  # the hub's own kinds of error differ from version to version
        if not _of_library(error):
            raise
        raise ValueError(
            f"data.tokenizer={name} is neither a file here nor a tokenizer that could be had from"
            f" the Hugging Face hub ({_first_line(error)}); give the path of a tokenizer.json, or"
            " bytes"
        ) from error
    return HuggingFace(backend, name=name)


def _local(name: str, path: Path) -> HuggingFace:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"data.tokenizer={name}: the folder holds no tokenizer.json; save the tokenizer there"
            " first"
        )
    try:
        text = _read(file, LARGEST_FILE)
        with _quiet():
            backend = Backend.from_str(text)
    except BaseException as error:  # the library raises bare Exception, and panics
        if not _of_library(error):
            raise
        reason = _first_line(error)
        raise ValueError(
            f"data.tokenizer={name}: {file} is no tokenizer ({reason}); give a tokenizer.json"
        ) from error
    return HuggingFace(backend, read_settings(file.parent), name)


def _without_chance(backend: Backend) -> str:
    """Switches off what the tokenizer's model draws at random; returns a remark on what that
    was."""
    model: Any = backend.model
    drawn = {key: getattr(model, key, None) for key in RANDOM_SETTINGS}
    drawn = {key: value for key, value in drawn.items() if value is not None}
    for key in drawn:
        setattr(model, key, None)
    if not any(drawn.values()):
        return ""
    settings = ", ".join(f"{key}={value:g}" for key, value in drawn.items() if value)
    return (
        f"the tokenizer's {settings} is switched off: every rank must read the same tokens, in"
        " every epoch"
    )


def _read(file: Path, largest: int) -> str:
    """The text of a file of at most so many bytes. Raises ValueError for a larger one, and for what
    is not UTF-8."""
    with open(file, "rb") as source:
        content = source.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it has more than {largest} bytes")
    return content.decode("utf-8")


def _of_library(error: BaseException) -> bool:
    """Tells if an error is to be reported: an Exception, or a panic of the library."""
    # The library raises a panic as a bare BaseException.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the library from writing to the console: a panic prints where in its own code it came
    up, which helps nobody."""
    try:
        console = os.dup(2)
    except OSError:  # standard error is closed
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(console, 2)
        os.close(console)
