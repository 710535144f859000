"""Local files of pairs: a source and a target in two fields of each row."""

import codecs
from collections.abc import Iterator
from functools import partial
from typing import Any

from models.ranges import Count
from trainer.data.documents import DocumentEncoder
from trainer.data.pairs import PairEncoder, pair_of
from trainer.data.sources.files import Files
from trainer.data.sources.readers import (
    MOST,
    File,
    ReadRequest,
    Unread,
    json_objects,
    opened,
    too_large,
)
from trainer.data.tokenizers import Tokenizer


def pair_lines(
    file: File, reading: ReadRequest, fields: tuple[str, str]
) -> Iterator[tuple[str, str]]:
    """Yields (line, pair) of the lines of JSON; blank lines are none."""
    with opened(file.path) as source:
        for number, end, value in json_objects(source, file.path, reading.most):
            pair = value
            if not isinstance(value, Unread):
                pair = pair_of(value, fields, f"{file.path} line {number}")
            if isinstance(pair, Unread):
                reading.report.fault(*pair)
            else:
                yield str(number), pair
            if reading.stops(end):
                return


def pair_columns(
    file: File, reading: ReadRequest, fields: tuple[str, str]
) -> Iterator[tuple[str, str]]:
    """Yields (line, pair) of a table whose first line names its columns, tabs between them."""
    with opened(file.path) as source:
        names: list[str] = []
        end = 0
        number = 0
        while raw := source.readline(reading.most + 1):
            number += 1
            end += len(raw)
            place = f"{file.path} line {number}"
            row = _cells(raw, place, reading.most)
            if isinstance(row, Unread):
                reading.report.fault(*row)
                continue
            if number == 1:
                names = row
                _require(names, fields, file.path, reading)
                continue
            if row == [""]:
                continue
            pair = pair_of(dict(zip(names, row, strict=False)), fields, place)
            if isinstance(pair, Unread):
                reading.report.fault(*pair)
            else:
                yield str(number), pair
            if reading.stops(end):
                return


def _cells(raw: bytes, place: str, most: int) -> list[str] | Unread:
    """Returns the cells of a line, or why it cannot be read."""
    if len(raw) > most:
        return too_large(place, len(raw), most)
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError:
        return Unread("lines not in UTF-8", f"{place} is not UTF-8 text")
    return text.rstrip("\r\n").split("\t")


def _require(names: list[str], fields: tuple[str, str], path: str, reading: ReadRequest) -> None:
    """Reports a table that lacks a column."""
    for key, field in zip(("source_field", "target_field"), fields, strict=True):
        if field not in names:
            reading.report.fault(
                "tables without a column",
                f"{path} line 1 names the columns {', '.join(names)}, and none is {field}"
                f" (data.{key})",
            )


class Pairs(Files):
    """Pairs of a source and a target, for models of two streams; files as for data=files.

    A line of a .jsonl (also .gz and .zst) is an object with both fields; a .tsv names its columns
    in its first line.

    Args:
        source_field, target_field: the fields of the two texts.
        source_length: tokens in a row of sources; None = as many as in a row.
    """

    content_decides = (*Files.content_decides, "source_field", "target_field")
    kind = "pairs"

    def __init__(
        self,
        *,
        path: str | None = None,
        held_out_path: str | None = None,
        source_field: str = "source",
        target_field: str = "target",
        source_length: Count | None = None,
        tokenizer: str = "bytes",
        pad_vocabulary_to: int = 1,
        held_out: float = 0.01,
        on_error: str = "raise",
        cache: str | None = None,
        max_document_bytes: int = MOST,
    ):
        super().__init__(
            path=path,
            held_out_path=held_out_path,
            tokenizer=tokenizer,
            pad_vocabulary_to=pad_vocabulary_to,
            held_out=held_out,
            on_error=on_error,
            cache=cache,
            max_document_bytes=max_document_bytes,
        )
        for key, field in (("source_field", source_field), ("target_field", target_field)):
            if not isinstance(field, str) or not field:
                raise ValueError(
                    f"data.{key}={field!r} names no field; give the name of a text's field"
                )
        if source_field == target_field:
            raise ValueError(
                f"data.target_field={target_field} is data.source_field too, and a model would copy"
                " its source; name two fields"
            )
        self.fields = (source_field, target_field)
        self.source_length = source_length
        # The key of the token cache holds the name of the field that was read.
        self.text_field = f"{source_field}\t{target_field}"
        lines = partial(pair_lines, fields=self.fields)
        self.readers: Any = {
            ".jsonl": lines,
            ".jsonl.gz": lines,
            ".jsonl.zst": lines,
            ".tsv": partial(pair_columns, fields=self.fields),
        }

    @property
    def has_source(self) -> bool:
        """See Source.has_source."""
        return True

    @property
    def sets_targets(self) -> bool:
        """See Source.sets_targets."""
        return True

    def encoder(self, tokenizer: Tokenizer) -> DocumentEncoder:
        """See Local.encoder."""
        return PairEncoder(tokenizer)
