"""Tokenised documents on disk: written once as Arrow record batches, then read through a memory
map.

A corpus is a folder: tokens.arrow (an IPC file; a row is a document: hash uint64, tokens list of
uint16 or uint32, the end-of-text token among them) and facts.json (counts, checksums, a fingerprint
of the content). It knows nothing of context lengths.
"""

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.data.errors import DataError, ReadReport
from trainer.data.split import digest
from trainer.data.tokenizers import Tokenizer, ended
from trainer.limited_reader import json_object

FORMAT = 2
TOKENS = "tokens.arrow"
FACTS = "facts.json"
# tokenised together, at most
TEXTS = 256
CHARACTERS = 8 << 20
BLOCK = 4 << 20  # tokens in one record batch, about
TRUSTED = 256 << 20  # bytes whose checksums are looked at on opening; the rest when first read


class Damaged(Exception):
    """A corpus whose files are not what was written."""


def write(
    folder: Path, named: Iterable[tuple[str, str]], tokenizer: Tokenizer, report: ReadReport
) -> dict[str, Any]:
    """Tokenise (name, text) documents into tokens.arrow of a folder; returns the facts, which are
    not yet written.

    A document of which the tokenizer makes no token is left out, and counted in `report`: its end
    alone is nothing that could be predicted.
    """
    dtype = np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32
    kind = pa.from_numpy_dtype(dtype)
    schema = pa.schema([("hash", pa.uint64()), ("tokens", pa.large_list(kind))])
    content = hashlib.blake2b(digest_size=16)
    sums = []
    documents = 0
    tokens = 0
    with pa.OSFile(str(folder / TOKENS), "wb") as sink, pa.ipc.new_file(sink, schema) as out:
        for hashes, ids in _blocks(named, tokenizer, dtype, report):
            flat = ids[0] if len(ids) == 1 else np.concatenate(ids)
            lengths = np.array([len(one) for one in ids], np.int64)
            ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
            lists = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(flat, kind))
            out.write_batch(pa.record_batch([pa.array(hashes, pa.uint64()), lists], schema=schema))
            for part in (np.array(hashes, np.uint64), lengths, flat):
                content.update(part.data)
            sums.append(zlib.crc32(flat.data))
            documents = documents + len(ids)
            tokens = tokens + len(flat)
    with open(folder / TOKENS, "rb") as done:
        os.fsync(done.fileno())
    content.update(tokenizer.fingerprint.encode())
    facts = {"format": FORMAT, "documents": documents, "tokens": tokens, "sums": sums}
    return facts | {"fingerprint": content.hexdigest(), "vocabulary": tokenizer.vocabulary}


def _blocks(
    named: Iterable[tuple[str, str]], tokenizer: Tokenizer, dtype: Any, report: ReadReport
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """(hashes, token arrays) of as many whole documents as make a record batch."""
    hashes = []
    ids = []
    held = 0
    for names, texts in _handfuls(named):
        for name, found in zip(names, tokenizer.encode_many(texts)):
            if not len(found):
                report.silent += 1
                continue
            if ids and len(found) >= BLOCK:  # to lay a large document beside others would copy it
                yield hashes, ids
                hashes = []
                ids = []
                held = 0
            hashes.append(digest(name))
            ids.append(ended(found.astype(dtype, copy=False), tokenizer.end_of_text))
            held += len(ids[-1])
        if held >= BLOCK:
            yield hashes, ids
            hashes = []
            ids = []
            held = 0
    if ids:
        yield hashes, ids


def _handfuls(named: Iterable[tuple[str, str]]) -> Iterator[tuple[list[str], list[str]]]:
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
    """The documents of a corpus, by number, in the order in which they were written.

    Attributes:
        facts: what facts.json says.
        hashes: [documents] uint64, one for each document's name.
        lengths: [documents] int64, tokens with the end of text.

    Raises Damaged where the files are not whole, FileNotFoundError where there is no corpus.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.facts = json_object(folder / FACTS)
            self.sums = self.facts["sums"]
            self.file = pa.ipc.open_file(pa.memory_map(str(folder / TOKENS)))
            blocks = [self.file.get_batch(i) for i in range(self.file.num_record_batches)]
            self.flats = [block.column(1).values.to_numpy(zero_copy_only=True) for block in blocks]
            self.ends = [block.column(1).offsets.to_numpy(zero_copy_only=True) for block in blocks]
            hashes = [block.column(0).to_numpy() for block in blocks]
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
        self.lengths = np.concatenate(
            [np.zeros(0, np.int64), *(np.diff(ends) for ends in self.ends)]
        )
        self.firsts = np.cumsum([0, *(len(ends) - 1 for ends in self.ends)])
        self.checked = [False] * len(self.flats)
        self._inspect()

    def _inspect(self) -> None:
        """Compare with the facts: counts always, checksums as far as they are cheap."""
        counts = len(self.sums), self.facts.get("documents"), self.facts.get("tokens")
        if counts != (len(self.flats), len(self.lengths), int(self.lengths.sum())):
            raise Damaged("the counts differ from those written")
        trusted = 0
        for block, flat in enumerate(self.flats):
            trusted += flat.nbytes
            if trusted <= TRUSTED:
                self._check(block)

    def _check(self, block: int) -> None:
        if zlib.crc32(self.flats[block]) != self.sums[block]:
            raise Damaged(f"block {block} of the tokens differs from what was written")
        self.checked[block] = True

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1 of a document (to its end at most), not to be written to.

        Raises DataFault where the disk spoiled them.
        """
        block = int(np.searchsorted(self.firsts, document, "right")) - 1
        if not self.checked[block]:
            try:
                self._check(block)
            except Damaged as error:
                raise DataError(
                    f"the token cache {self.folder} is damaged ({error}); remove it and run again"
                ) from error
        first, end = self.ends[block][document - self.firsts[block] :][:2]
        return self.flats[block][first + start : min(first + stop, end)]
