"""The token cache: one process tokenizes the data once, while the others wait for it."""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.data.corpus import FACTS, FORMAT, Corpus, Damaged, write
from trainer.data.errors import DataError, ReadReport
from trainer.data.folders import home, spare_folder, writable
from trainer.data.sources.base import Local
from trainer.data.sources.readers import File, reason
from trainer.data.tokenizers import Tokenizer
from trainer.files.locks import exclusive

LOG = logging.getLogger("longspan.data")
TELL_S = 10  # seconds between two lines of progress


def place(source: Local, files: list[File], tokenizer: Tokenizer) -> Path:
    """Returns the folder for the corpus of these files and this tokenizer; it need not exist."""
    encoder = source.encoder(tokenizer)
    identity = f"{FORMAT} {source.key(files)} {encoder.fingerprint}"
    key = hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()
    name = f"{type(source).__name__.lower()}-{key}"
    root = os.path.expanduser(source.cache) if source.cache else _user_cache(name)
    return Path(root) / name


def _user_cache(corpus: str) -> str:
    """Returns the user's cache folder, or one for temporary files where that is of no use.

    The user's folder is taken if it can be written, or if it holds `corpus` already.

    Raises:
        ValueError: no folder can be written.
    """
    # XDG base directories: an unset or relative variable counts as unset.
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        user = home()
        base = str(user / ".cache") if user is not None else ""
    folder = os.path.join(base, "longspan") if base else ""
    if folder and (writable(folder) or os.path.isdir(os.path.join(folder, corpus))):
        return folder
    why = f"{folder} cannot be written" if folder else "a home folder is not known"
    try:
        return spare_folder("cache", why)
    except OSError as error:
        raise ValueError(
            "data.cache=null: there is no folder that the tokens can be written to"
            f" ({reason(error)}); give one with data.cache"
        ) from error


def _say_waiting() -> None:
    LOG.info("another process is tokenising the data; waiting for it")


def corpus_of(source: Local, tokenizer: Tokenizer) -> Corpus:
    """Opens the tokenized documents of a source, and tokenizes them where the cache lacks them.

    Any number of processes may call this at once: one builds, the others wait for its lock and then
    read. A corpus appears under its name only when whole.

    Raises:
        ValueError: there are no files, a document cannot be read (or all were left out), or the
            disk of the cache is full.
    """
    files = source.files()
    folder = place(source, files, tokenizer)
    corpus = _open(folder)
    if corpus is not None:
        return corpus
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder.with_suffix(".lock"), _say_waiting):
            # Another process may have built it while this one waited for the lock.
            corpus = _open(folder)
            if corpus is None:
                corpus = _build(folder, source, files, tokenizer)
    except OSError as error:
        raise DataError(
            f"the token cache {folder} cannot be written ({error}); give a folder with data.cache"
        ) from error
    return corpus


def _open(folder: Path) -> Corpus | None:
    """Opens a corpus; None where there is none or a damaged one."""
    try:
        return Corpus(folder)
    except FileNotFoundError:
        return None
    except Damaged as error:
        LOG.warning("the token cache %s is damaged (%s): it is built again", folder, error)
        return None


def _build(folder: Path, source: Local, files: list[File], tokenizer: Tokenizer) -> Corpus:
    """Tokenizes a source into `folder`; the caller holds the lock."""
    # Under the lock, these can only be what a process that died has left.
    for leftover in [folder, *folder.parent.glob(f"{folder.name}.part-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    report = ReadReport(source.on_error)
    LOG.info("tokenising %d files into %s", len(files), folder)
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    part.mkdir()
    try:
        documents = _with_progress(source.documents(files, report))
        facts = write(part, documents, tokenizer, report, source.encoder(tokenizer))
        if not facts["documents"]:
            raise DataError(nothing(len(files), report))
        with open(part / FACTS, "w", encoding="utf-8") as out:
            json.dump(facts | {"report": report.facts()}, out)
            out.flush()
            os.fsync(out.fileno())
        # The rename is atomic, so readers without the lock see a whole corpus or none.
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Corpus(folder)


def _with_progress(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yields the same documents and logs their number every TELL_S seconds."""
    last_line = time.monotonic()
    for number, document in enumerate(documents):
        if time.monotonic() - last_line > TELL_S:
            last_line = time.monotonic()
            LOG.info("%d documents tokenised so far", number)
        yield document


def nothing(files: int, report: ReadReport) -> str:
    """Returns the message for data without a single usable document."""
    why = report.text() or "they hold no text"
    return f"no document is left of {files} files ({why}); give other data"
