"""Entry points of the run: check the data before any rank starts, and open it as a stream."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.data.cache import nothing, place
from trainer.data.corpus import FACTS
from trainer.data.errors import NONE_HELD_OUT, ONE_DOCUMENT, DataError, ReadReport
from trainer.data.folders import writable
from trainer.data.sources.base import Local, Source, build_source
from trainer.data.sources.mixture import Mixture, placed
from trainer.data.sources.pairs import Pairs
from trainer.data.sources.readers import File, suffix_of
from trainer.data.sources.streaming import SAMPLED, StreamingSource
from trainer.data.split import SPLITS
from trainer.data.streams.base import Stream
from trainer.data.streams.mixture import MixtureStream
from trainer.data.streams.packed import PackedStream
from trainer.data.streams.pairs import PairStream
from trainer.data.streams.streaming import NOTHING, StreamingStream
from trainer.data.streams.synthetic import SyntheticStream
from trainer.data.tasks.base import SyntheticTask
from trainer.data.tokenizers import Tokenizer
from trainer.errors import BAD_CONFIG
from trainer.files.limited_reader import json_object

LOOK = 64 << 20  # bytes read by `check`
SLICE = 4096  # characters tokenized at once in search of a token
NO_LANES = (
    "memory: rows go on from row to row under it, and those of data=mixture come from different"
    " sources; use memory=none, or one source"
)
NO_PAIRS = (
    "data.sources: rows of pairs bring rows of their sources, which data=mixture does not join; put"
    " the pairs into one file, or name several by a glob in data.path"
)
GLANCE = 4  # documents of a streamed source read by `check`


def open_stream(
    data: Mapping[str, Any] | Source,
    *,
    context_length: int,
    rows: int,
    seed: int,
    split: str = "train",
    lanes: bool = False,
) -> Stream:
    """Opens the batches of a data node, the same for every rank.

    The first call tokenizes finite data.

    Args:
        data: the node: `_target_` and its settings.
        context_length: tokens that a row predicts.
        rows: rows in a batch, over all ranks.
        seed: of the order of training documents.
        split: train, or held_out for evaluation.
        lanes: True = row i of a batch continues where row i of the batch before ended, positions
            too (for a memory).

    Raises:
        ValueError: settings or data that cannot be read.
    """
    for name, value in {"context_length": context_length, "rows": rows}.items():
        # Python counts True as the number 1.
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            unit = "rows" if name == "rows" else "tokens"
            raise ValueError(f"{name}={value} is no number of {unit}; give 1 or more")
    if split not in SPLITS:
        raise ValueError(f"split={split} is unknown; give train or held_out")
    source = build_source(data)
    settings = {
        "context_length": context_length,
        "rows": rows,
        "seed": seed,
        "split": split,
        "lanes": lanes,
    }
    if isinstance(source, Pairs):
        return PairStream(source, **settings)
    if isinstance(source, Local):
        return PackedStream(source, **settings)
    if isinstance(source, SyntheticTask):
        return SyntheticStream(source, **settings)
    if isinstance(source, Mixture):
        return _open_mixture(source, settings)
    assert isinstance(source, StreamingSource), (
        f"{type(source).__name__} is neither Local nor Endless"
    )
    return StreamingStream(source, **settings)


def _open_mixture(source: Mixture, settings: dict[str, Any]) -> MixtureStream:
    """Opens the batches of a mixture."""
    if settings["lanes"]:
        raise DataError(NO_LANES, BAD_CONFIG)
    if any(part.has_source for part in source.sources.values()):
        raise DataError(NO_PAIRS, BAD_CONFIG)
    split = settings["split"]
    streams: dict[str, Stream] = {}
    by_source: dict[str, Stream] = {}
    of_one_row: dict[str, Any] = {**settings, "rows": 1}
    for name, part in source.sources.items():
        if split == "held_out" and not part.holds_out:
            continue
        try:
            streams[name] = open_stream(part, **of_one_row)
            if split == "held_out":
                by_source[name] = open_stream(part, **settings)
        except ValueError as error:
            raise DataError(placed(str(error), name, part)) from error
    return MixtureStream(
        source,
        streams,
        context_length=settings["context_length"],
        rows=settings["rows"],
        split=split,
        by_source=by_source,
    )


def check(
    data: Mapping[str, Any] | Source,
    *,
    evaluates: bool = False,
    context_length: int | None = None,
    lanes: bool = False,
) -> list[str]:
    """Checks the data without tokenizing it.

    Reads the first 64 MB of files and stats the rest (nothing where the tokens are in the cache),
    the first few documents of a streamed data set, or an example of a task. Faults further in are
    found while the data is tokenized, with the same message.

    Args:
        data: the node: `_target_` and its settings.
        evaluates: True if the run will ask for held-out documents.
        context_length: as for open_stream, where it is known; checks that a task's examples fit in
            rows.
        lanes: as for open_stream.

    Returns:
        One message for each fault.
    """
    try:
        source = build_source(data)
    except ValueError as error:
        return [str(error)]
    errors: list[str] = []
    if evaluates and not source.holds_out:
        errors.append(NONE_HELD_OUT)
    # A bad tokenizer does not keep the files from being checked: the user sees all faults at once.
    tokenizer = None
    try:
        tokenizer = source.tokenizer()
    except ValueError as error:
        errors.append(str(error))
    try:
        if isinstance(source, Local):
            _check_local(source, tokenizer, evaluates, errors)
        elif isinstance(source, Mixture):
            errors += _check_mixture(source, evaluates, context_length, lanes)
        elif isinstance(source, StreamingSource):
            errors += _glance(source, tokenizer)
        elif isinstance(source, SyntheticTask) and context_length is not None:
            splits = ("train", "held_out") if evaluates and source.held_out else ("train",)
            for split in splits:
                SyntheticStream(
                    source, context_length=context_length, rows=1, seed=0, split=split, lanes=lanes
                )
    except ValueError as error:
        errors.append(str(error))
    return errors


def _check_mixture(
    source: Mixture, evaluates: bool, context_length: int | None, lanes: bool
) -> list[str]:
    """Returns the faults of every source of a mixture, without those of their tokenizers."""
    if lanes:
        return [NO_LANES]
    if any(part.has_source for part in source.sources.values()):
        return [NO_PAIRS]
    errors: list[str] = []
    for name, part in source.sources.items():
        try:
            part.tokenizer()
        except ValueError:
            continue  # reported with the mixture's
        wishes = evaluates and part.holds_out
        faults = check(part, evaluates=wishes, context_length=context_length)
        errors += [placed(fault, name, part) for fault in faults]
    return errors


def _check_local(
    source: Local, tokenizer: Tokenizer | None, evaluates: bool, errors: list[str]
) -> None:
    """Appends the faults of local files to `errors`, also those before an exception."""
    files = source.files()
    folder = None if tokenizer is None else place(source, files, tokenizer)
    count = None if folder is None else _cached(folder)
    if count is None:
        if folder is not None and not writable(folder.parent):
            errors.append(f"data.cache={folder.parent}: it cannot be written; give another folder")
        faults, count = _look(source, files, tokenizer)
        errors += faults
    apart = source.apart()
    if evaluates and apart is not None:
        _check_local(apart, tokenizer, False, errors)
    elif evaluates and count == 1 and source.held_out:
        errors.append(ONE_DOCUMENT)


def _cached(folder: Path) -> int | None:
    """Counts the documents in the cache; None where it has no corpus, or a damaged one."""
    try:
        return int(json_object(folder / FACTS)["documents"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _glance(source: StreamingSource, tokenizer: Tokenizer | None) -> list[str]:
    """Returns the faults of the first documents of a streamed data set.

    Reads GLANCE of them, and more while none has yielded a token.
    """
    has_tokens = tokenizer is None
    texts = itertools.islice(source.texts(ReadReport(source.on_error)), SAMPLED)
    seen = 0
    for seen, (_, text) in enumerate(texts, 1):
        if not has_tokens and text is not None:
            has_tokens = _has_tokens(tokenizer, text)
        if seen >= GLANCE and has_tokens:
            return []
    if has_tokens:
        return []
    name = f"{source.identity()} (of which {seen} documents were read)"
    return [NOTHING.format(name, source.tokenizer_name)]


def _has_tokens(tokenizer: Tokenizer | None, text: str) -> bool:
    """Tells if a text yields any token; True without a tokenizer."""
    if tokenizer is None:
        return True
    # In slices: the first one nearly always decides, and a text may be large.
    for start in range(0, len(text), SLICE):
        if len(tokenizer.encode(text[start : start + SLICE])):
            return True
    return False


def _look(
    source: Local, files: list[File], tokenizer: Tokenizer | None
) -> tuple[list[str], int | None]:
    """Reads the first LOOK bytes of the files.

    Returns:
        (faults, number of all documents; None where not all of them were seen).
    """
    # "skip", so that all faults are counted; `source.on_error` decides below if they are errors.
    report = ReadReport("skip")
    left = LOOK
    documents = 0
    has_tokens = False
    encoder = None if tokenizer is None else source.encoder(tokenizer)
    for file in files:
        # A fault that stat shows costs no reading, so it is reported however far in it lies.
        fault_without_reading = file.unreadable or file.size > source.max_document_bytes
        if file.folder or (left <= 0 and not fault_without_reading):
            continue
        for name, text in source.documents([file], report, limit=max(left, 1)):
            documents += 1
            if encoder is not None:
                encoder.inspect(name, text, report)
            has_tokens = has_tokens or _has_tokens(tokenizer, text)
        # What is compressed may hold more than its file has bytes.
        left = 0 if report.cut_short else left - file.size
    # A .txt file is one document, however little of it was read.
    is_one_text = len(files) == 1 and suffix_of(files[0].path) == ".txt"
    count = documents if left > 0 or is_one_text else None
    if source.on_error == "raise" and report.left_out:
        remedy = "mend or remove it, or leave such data out with data.on_error=skip"
        messages = [f"{message}; {remedy}" for message in report.examples]
        more = report.left_out - len(report.examples)
        if more:
            messages.append(f"and {more} more faults of the data")
        return messages, count
    if count is None or has_tokens:
        return [], count
    if count:
        report.silent = documents
    return [nothing(len(files), report)], count
