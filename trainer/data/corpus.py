"""Tokenized documents on disk: written once as Arrow record batches, read through a memory map.

A corpus is a folder: tokens.arrow (an IPC file; a row is a document: hash uint64, tokens list of
uint16 or uint32, the end-of-text token among them; of conversations also given list of uint8, 1 for
a token that is no target, and turns list of int64) and facts.json (counts, checksums, a fingerprint
of the content). It is independent of the context length.
"""

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from trainer.data.documents import DocumentEncoder, EncodedDocument, PlainText
from trainer.data.errors import DataError, ReadReport
from trainer.data.split import digest
from trainer.data.tokenizers import Tokenizer
from trainer.files.limited_reader import json_object

FORMAT = 2
TOKENS = "tokens.arrow"
FACTS = "facts.json"
TEXTS = 256  # documents tokenized at once, at most
CHARACTERS = 8 << 20  # characters tokenized at once, beyond which no further document is added
BLOCK = 4 << 20  # approximate tokens of one record batch
TRUSTED = 256 << 20  # bytes whose checksums are computed on opening; the rest when first read


class Damaged(Exception):
    """Raised for a corpus whose files differ from what was written."""


def write(
    folder: Path,
    named: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    report: ReadReport,
    encoder: DocumentEncoder | None = None,
) -> dict[str, Any]:
    """Tokenizes documents into tokens.arrow of a folder.

    A document whose text yields no token is left out and counted in `report`: with its end alone,
    there is nothing to predict.

    Args:
        folder: of the corpus.
        named: (name, text) of each document.
        tokenizer: turns texts into tokens.
        report: counts what is left out.
        encoder: makes documents of the texts; None = each text is one.

    Returns:
        The facts, which the caller writes.
    """
    encoder = PlainText(tokenizer) if encoder is None else encoder
    dtype = np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32
    schema = _schema(dtype, encoder)
    content = hashlib.blake2b(digest_size=16)
    sums = []
    document_count = 0
    token_count = 0
    with pa.OSFile(str(folder / TOKENS), "wb") as sink, pa.ipc.new_file(sink, schema) as out:
        for hashes, documents in _blocks(named, encoder, dtype, report):
            flat, tokens = _lists([document.tokens for document in documents], dtype)
            lengths = np.array([len(document.tokens) for document in documents], np.int64)
            columns = [pa.array(hashes, pa.uint64()), tokens]
            content.update(np.array(hashes, np.uint64).data)
            content.update(lengths.data)
            content.update(flat.data)
            checksum = zlib.crc32(flat.data)
            if encoder.learns_part:
                given, given_lists = _lists([_given(document) for document in documents], np.uint8)
                turns, turn_lists = _lists([_turns(document) for document in documents], np.int64)
                columns += [given_lists, turn_lists]
                for array in (given, turns):
                    content.update(array.data)
                    checksum = zlib.crc32(array.data, checksum)
            out.write_batch(pa.record_batch(columns, schema=schema))
            sums.append(checksum)
            document_count += len(documents)
            token_count += len(flat)
    with open(folder / TOKENS, "rb") as written:
        os.fsync(written.fileno())
    content.update(encoder.fingerprint.encode())
    return {
        "format": FORMAT,
        "documents": document_count,
        "tokens": token_count,
        "sums": sums,
        "fingerprint": content.hexdigest(),
        "vocabulary": tokenizer.vocabulary,
    }


def _schema(dtype: Any, encoder: DocumentEncoder) -> pa.Schema:
    """Returns the columns of tokens.arrow; those of roles are there where a part is learned."""
    fields = [("hash", pa.uint64()), ("tokens", pa.large_list(pa.from_numpy_dtype(dtype)))]
    if encoder.learns_part:
        fields += [("given", pa.large_list(pa.uint8())), ("turns", pa.large_list(pa.int64()))]
    return pa.schema(fields)


def _lists(arrays: list[np.ndarray], dtype: Any) -> tuple[np.ndarray, pa.Array]:
    """Returns arrays end to end, and as a column of lists."""
    # A large document is a block of its own and must not be copied.
    flat = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    lengths = np.array([len(array) for array in arrays], np.int64)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    values = pa.array(flat, pa.from_numpy_dtype(dtype))
    return flat, pa.LargeListArray.from_arrays(pa.array(ends), values)


def _given(document: EncodedDocument) -> np.ndarray:
    assert document.given is not None, "an encoder that learns a part says which"
    return document.given.astype(np.uint8)


def _turns(document: EncodedDocument) -> np.ndarray:
    assert document.turns is not None, "an encoder that learns a part says where turns begin"
    return document.turns.astype(np.int64)


def _blocks(
    named: Iterable[tuple[str, str]], encoder: DocumentEncoder, dtype: Any, report: ReadReport
) -> Iterator[tuple[list[int], list[EncodedDocument]]]:
    """Yields (hashes, documents) of the whole documents that make up a record batch."""
    hashes: list[int] = []
    documents: list[EncodedDocument] = []
    block_tokens = 0
    for names, texts in _text_batches(named):
        for name, document in zip(names, encoder.encode_all(names, texts, report)):
            if document is None:
                continue
            # Concatenating a large document with others would copy it.
            if documents and len(document.tokens) >= BLOCK:
                yield hashes, documents
                hashes = []
                documents = []
                block_tokens = 0
            hashes.append(digest(name))
            tokens = document.tokens.astype(dtype, copy=False)
            documents.append(document._replace(tokens=tokens))
            block_tokens += len(tokens)
        if block_tokens >= BLOCK:
            yield hashes, documents
            hashes = []
            documents = []
            block_tokens = 0
    if documents:
        yield hashes, documents


def _text_batches(named: Iterable[tuple[str, str]]) -> Iterator[tuple[list[str], list[str]]]:
    """Yields (names, texts) of the documents to tokenize at once."""
    names = []
    texts = []
    size = 0
    for name, text in named:
        names.append(name)
        texts.append(text)
        size += len(text)
        if len(texts) >= TEXTS or size >= CHARACTERS:
            yield names, texts
            names = []
            texts = []
            size = 0
    if texts:
        yield names, texts


class Corpus:
    """Documents of a corpus, by number, in the order in which they were written.

    Args:
        folder: of the corpus.

    Attributes:
        facts: contents of facts.json.
        hashes: [documents] uint64, of the documents' names.
        lengths: [documents] int64, tokens with the end of text.
        learns_part: whether it tells which tokens are given.

    Raises:
        Damaged: the files are not whole.
        FileNotFoundError: there is no corpus.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        # Any of these errors can come from a file with damaged bytes.
        try:
            self.facts = json_object(folder / FACTS)
            self.sums = self.facts["sums"]
            self.file = pa.ipc.open_file(pa.memory_map(str(folder / TOKENS)))
            self.flats: list[np.ndarray] = []
            self.ends: list[np.ndarray] = []
            self.givens: list[np.ndarray] = []
            self.turn_lists: list[tuple[np.ndarray, np.ndarray]] = []
            self.learns_part = "given" in self.file.schema.names
            hashes: list[np.ndarray] = []
            for number in range(self.file.num_record_batches):
                block = self.file.get_batch(number)
                tokens = block.column(1)
                # zero_copy_only: views of the memory map, so that the pages stay the system's.
                self.flats.append(tokens.values.to_numpy(zero_copy_only=True))
                self.ends.append(tokens.offsets.to_numpy(zero_copy_only=True))
                hashes.append(block.column(0).to_numpy())
                if self.learns_part:
                    self.givens.append(block.column(2).values.to_numpy(zero_copy_only=True))
                    turns = block.column(3)
                    self.turn_lists.append((turns.values.to_numpy(), turns.offsets.to_numpy()))
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OSError,
            pa.ArrowException,
        ) as error:
            if not (folder / FACTS).exists():
                raise FileNotFoundError(folder) from error
            raise Damaged(f"{type(error).__name__}: {error}") from error
        self.hashes = np.concatenate([np.zeros(0, np.uint64), *hashes])
        lengths = [np.diff(ends) for ends in self.ends]
        self.lengths = np.concatenate([np.zeros(0, np.int64), *lengths])
        # The number of each block's first document.
        self.firsts = np.cumsum([0, *(len(ends) - 1 for ends in self.ends)])
        self.checked = [False] * len(self.flats)
        self._inspect()

    def _inspect(self) -> None:
        """Compares with the facts: counts always, checksums as far as they are cheap."""
        counts = (len(self.flats), len(self.lengths), int(self.lengths.sum()))
        if counts != (len(self.sums), self.facts.get("documents"), self.facts.get("tokens")):
            raise Damaged("the counts differ from those written")
        if self.learns_part:
            sizes = [len(flat) for flat in self.flats]
            if [len(given) for given in self.givens] != sizes:
                raise Damaged("not every token tells if it is given")
        # A large corpus would take minutes; `tokens` checks its later blocks.
        total = 0
        for block, flat in enumerate(self.flats):
            total += flat.nbytes
            if total <= TRUSTED:
                self._check(block)

    def _check(self, block: int) -> None:
        """Compares the checksum of one block with the one that was written."""
        checksum = zlib.crc32(cast(Any, self.flats[block]))
        if self.learns_part:
            checksum = zlib.crc32(cast(Any, self.givens[block]), checksum)
            checksum = zlib.crc32(cast(Any, self.turn_lists[block][0]), checksum)
        if checksum != self.sums[block]:
            raise Damaged(f"block {block} of the tokens differs from what was written")
        self.checked[block] = True

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Returns a read-only view of tokens start .. stop - 1 of a document, to its end at most.

        Raises:
            DataError: the tokens differ from what was written.
        """
        block, first, end = self._place(document)
        return self.flats[block][first + start : min(first + stop, end)]

    def given(self, document: int, start: int, stop: int) -> np.ndarray | None:
        """Returns which of the same tokens are no targets, [n] bool; None where all are targets.

        Raises:
            DataError: the tokens differ from what was written.
        """
        if not self.learns_part:
            return None
        block, first, end = self._place(document)
        return self.givens[block][first + start : min(first + stop, end)].astype(bool)

    def turns(self, document: int) -> np.ndarray:
        """Returns the tokens of a document before which it may be cut, by number."""
        if not self.learns_part:
            return np.zeros(0, np.int64)
        block = int(np.searchsorted(self.firsts, document, "right")) - 1
        values, ends = self.turn_lists[block]
        first, end = ends[document - self.firsts[block] :][:2]
        return values[first:end]

    def _place(self, document: int) -> tuple[int, int, int]:
        """Returns (block, first token, end) of a document, once its block was checked."""
        block = int(np.searchsorted(self.firsts, document, "right")) - 1
        if not self.checked[block]:
            try:
                self._check(block)
            except Damaged as error:
                raise DataError(
                    f"the token cache {self.folder} is damaged ({error}); remove it and run again"
                ) from error
        number_in_block = document - self.firsts[block]
        first, end = self.ends[block][number_in_block : number_in_block + 2]
        return block, int(first), int(end)
