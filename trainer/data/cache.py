"""The token cache: a corpus is built by one process, once, while the others wait for it."""

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
from trainer.locks import exclusive

LOG = logging.getLogger("longspan.data")
TELL_S = 10  # seconds between two lines about how far the tokenising is


def place(source: Local, files: list[File], tokenizer: Tokenizer) -> Path:
    """The folder of the corpus of these files under this tokenizer, whether or not it exists."""
    key = hashlib.blake2b(
        f"{FORMAT} {source.key(files)} {tokenizer.fingerprint}".encode(), digest_size=12
    ).hexdigest()
    name = f"{type(source).__name__.lower()}-{key}"
    return Path(os.path.expanduser(source.cache) if source.cache else _home(name)) / name


def _home(corpus: str) -> str:
    """The user's cache folder (XDG base directories: an unset or relative variable counts as none).

    Where there is none that can be written, and none that has the corpus, a folder for temporary
    files.

    Raises ValueError where there is no folder to write to at all.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    user = home()
    if not os.path.isabs(base):
        base = str(user / ".cache") if user is not None else ""
    folder = os.path.join(base, "longspan") if base else ""
    if folder and (writable(folder) or os.path.isdir(os.path.join(folder, corpus))):
        return folder
    try:
        return spare_folder(
            "cache",
            f"{folder or 'a home folder'} {'cannot be written' if folder else 'is not known'}",
        )
    except OSError as error:
        raise ValueError(
            "data.cache=null: there is no folder that the tokens can be written to"
            f" ({reason(error)}); give one with data.cache"
        ) from error


def _say_waiting() -> None:
    LOG.info("another process is tokenising the data; waiting for it")


def corpus_of(source: Local, tokenizer: Tokenizer) -> Corpus:
    """The tokenised documents of a source, from the cache or tokenised now.

    Any number of processes may call this at once: one builds, the others wait for its lock and then
    read. A corpus appears under its name only when whole.

    Raises:
        ValueError: there are no files, a document cannot be read (or all were left out), or the
            cache has no room.
    """
    files = source.files()
    folder = place(source, files, tokenizer)
    found = _opened(folder)
    if found is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(folder.with_suffix(".lock"), _say_waiting):
                found = _opened(folder) or _built(folder, source, files, tokenizer)
        except OSError as error:
            raise DataError(
                f"the token cache {folder} cannot be written ({error}); give a folder with"
                " data.cache"
            ) from error
    return found


def _opened(folder: Path) -> Corpus | None:
    try:
        return Corpus(folder)
    except FileNotFoundError:
        return None
    except Damaged as error:
        LOG.warning("the token cache %s is damaged (%s): it is built again", folder, error)
        return None


def _built(folder: Path, source: Local, files: list[File], tokenizer: Tokenizer) -> Corpus:
    """Called under the lock: whatever lies beside the folder under its name was left by a process
    that died."""
    for old in [folder, *folder.parent.glob(f"{folder.name}.part-*")]:
        shutil.rmtree(old, ignore_errors=True)
    report = ReadReport(source.on_error)
    LOG.info("tokenising %d files into %s", len(files), folder)
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    part.mkdir()
    try:
        facts = write(part, _told(source.documents(files, report)), tokenizer, report)
        if not facts["documents"]:
            raise DataError(nothing(len(files), report))
        with open(part / FACTS, "w", encoding="utf-8") as out:
            json.dump(facts | {"report": report.facts()}, out)
            out.flush()
            os.fsync(out.fileno())
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Corpus(folder)


def _told(named: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The same documents; says now and then how many there were."""
    last = time.monotonic()
    for number, document in enumerate(named):
        if time.monotonic() - last > TELL_S:
            last = time.monotonic()
            LOG.info("%d documents tokenised so far", number)
        yield document


def nothing(files: int, report: ReadReport) -> str:
    """The message for data of which no document is left."""
    return (
        f"no document is left of {files} files ({report.text() or 'they hold no text'}); give other"
        " data"
    )
