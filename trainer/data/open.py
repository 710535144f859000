"""What the run calls: look at the data before any rank starts, and open it as a stream."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.data.cache import nothing, place
from trainer.data.corpus import FACTS
from trainer.data.errors import NONE_HELD_OUT, ONE_DOCUMENT, ReadReport
from trainer.data.folders import writable
from trainer.data.sources.base import Local, Source, build_source
from trainer.data.sources.readers import File, suffix_of
from trainer.data.sources.streaming import SAMPLED, StreamingSource
from trainer.data.split import SPLITS
from trainer.data.streams.base import Stream
from trainer.data.streams.packed import PackedStream
from trainer.data.streams.streaming import NOTHING, StreamingStream
from trainer.data.streams.synthetic import SyntheticStream
from trainer.data.tasks.base import SyntheticTask
from trainer.data.tokenizers import Tokenizer
from trainer.limited_reader import json_object

LOOK = 64 << 20  # bytes read by `check`
SLICE = 4096  # characters tokenised at once in search of a token
GLANCE = 4  # documents of an endless source read by `check`


def open_stream(
    data: Mapping[str, Any] | Source,
    *,
    context_length: int,
    rows: int,
    seed: int,
    split: str = "train",
    lanes: bool = False,
) -> Stream:
    """The batches of a data node, for every rank alike.

    Args:
        data: the node: `_target_` and its settings.
        context_length: tokens that a row predicts.
        rows: rows in a batch, over all ranks.
        seed: of the order of training documents.
        split: train, or held_out for evaluation.
        lanes: True = row i of a batch goes on where row i of the batch before ended, positions too
            (for a memory).

    Raises ValueError for settings or data that cannot be read; the first call tokenises finite
    data.
    """
    for name, value in {"context_length": context_length, "rows": rows}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{name}={value} is no number of {'rows' if name == 'rows' else 'tokens'}; give 1"
                " or more"
            )
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
    if isinstance(source, Local):
        return PackedStream(source, **settings)
    if isinstance(source, SyntheticTask):
        return SyntheticStream(source, **settings)
    assert isinstance(source, StreamingSource), (
        f"{type(source).__name__} is neither Local nor Endless"
    )
    return StreamingStream(source, **settings)


def check(
    data: Mapping[str, Any] | Source,
    *,
    evaluates: bool = False,
    context_length: int | None = None,
    lanes: bool = False,
) -> list[str]:
    """What is wrong with the data, found without tokenising it: a message each, none where all is
    well.

    Reads the first 64 MB of files and stats the rest (nothing where the tokens are in the cache),
    the first few documents of a streamed data set, or an example of a task. What lies further in is
    found while the data is tokenised, with the same message.

    evaluates: whether the run will ask for held-out documents.
    context_length, lanes: as for open_stream, where they are known: whether a task's examples fit
    in rows.
    """
    try:
        source = build_source(data)
    except ValueError as error:
        return [str(error)]
    found = [NONE_HELD_OUT] if evaluates and not source.held_out else []
    tokenizer = None
    try:
        tokenizer = source.tokenizer()
    except ValueError as error:
        found.append(str(error))
    try:
        if isinstance(source, Local):
            files = source.files()
            folder = None if tokenizer is None else place(source, files, tokenizer)
            count = None if folder is None else _cached(folder)
            if count is None:
                if folder is not None and not writable(folder.parent):
                    found.append(
                        f"data.cache={folder.parent}: it cannot be written; give another folder"
                    )
                faults, count = _look(source, files, tokenizer)
                found += faults
            if evaluates and count == 1 and source.held_out:
                found.append(ONE_DOCUMENT)
        elif isinstance(source, StreamingSource):
            found += _glance(source, tokenizer)
        elif isinstance(source, SyntheticTask) and context_length is not None:
            for split in ("train", "held_out") if evaluates and source.held_out else ("train",):
                SyntheticStream(
                    source, context_length=context_length, rows=1, seed=0, split=split, lanes=lanes
                )
    except ValueError as error:
        found.append(str(error))
    return found


def _cached(folder: Path) -> int | None:
    """How many documents the cache has; None where it has no corpus, or a damaged one."""
    try:
        return int(json_object(folder / FACTS)["documents"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _glance(source: StreamingSource, tokenizer: Tokenizer | None) -> list[str]:
    """The faults of the first documents: GLANCE of them, and more where the tokenizer makes no
    token of those."""
    speaks = tokenizer is None
    texts = itertools.islice(source.texts(ReadReport(source.on_error)), SAMPLED)
    seen = 0
    for seen, (_, text) in enumerate(texts, 1):
        speaks = speaks or (text is not None and _speaks(tokenizer, text))
        if seen >= GLANCE and speaks:
            return []
    name = f"{source.identity()} (of which {seen} documents were read)"
    return [] if speaks else [NOTHING.format(name, source.tokenizer_name)]


def _speaks(tokenizer: Tokenizer | None, text: str) -> bool:
    """Whether a tokenizer makes any token of a text; looks at as little of it as shows that."""
    if tokenizer is None:
        return True
    return any(
        len(tokenizer.encode(text[span : span + SLICE])) for span in range(0, len(text), SLICE)
    )


def _look(
    source: Local, files: list[File], tokenizer: Tokenizer | None
) -> tuple[list[str], int | None]:
    """The faults of the first LOOK bytes, and how many documents there are in all where that was
    seen."""
    report = ReadReport("skip")
    left = LOOK
    documents = 0
    speaks = False
    for file in files:
        told_by_stat = file.unreadable or file.size > source.max_document_bytes
        if file.folder or (left <= 0 and not told_by_stat):
            continue
        for _, text in source.documents([file], report, limit=max(left, 1)):
            documents += 1
            speaks = speaks or _speaks(tokenizer, text)
        left -= file.size
    count = (
        documents if left > 0 or (len(files) == 1 and suffix_of(files[0].path) == ".txt") else None
    )
    if source.on_error == "raise" and report.left_out:
        more = report.left_out - len(report.examples)
        way_out = "mend or remove it, or leave such data out with data.on_error=skip"
        messages = [f"{message}; {way_out}" for message in report.examples]
        return [*messages, *([f"and {more} more faults of the data"] if more else [])], count
    if count and not speaks:
        report.silent = documents
    return ([nothing(len(files), report)] if count is not None and not speaks else []), count
