"""Local files of conversations: rows with messages, with prompt and completion, or with text."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa
from pyarrow import parquet

from trainer.data.chat_template import CHATML, ChatTemplate
from trainer.data.conversations import FIELDS, ConversationEncoder, row_of
from trainer.data.documents import DocumentEncoder
from trainer.data.errors import DataError
from trainer.data.sources.arrow import broken, record_batches, stream_schema
from trainer.data.sources.files import Files, file_at
from trainer.data.sources.parquet import FAULTS
from trainer.data.sources.parquet_pages import pages, rows_at_once
from trainer.data.sources.prepared import check_name, prepared_files
from trainer.data.sources.readers import (
    MOST,
    File,
    ReadRequest,
    Unread,
    json_objects,
    opened,
    reason,
    too_large,
)
from trainer.data.tokenizers import ChatTokenizer, Tokenizer
from trainer.files.limited_reader import contents

LARGEST_TEMPLATE = 1 << 20  # bytes of a file of data.chat_template
ROWS = 64  # of a Parquet file decoded at a time, at most
PIECE = 32 << 20  # bytes of one column decoded at a time
BUILT_IN = {"chatml": CHATML}
OF_A_NAME = ("name", "subset", "split", "revision")


def conversation_lines(file: File, reading: ReadRequest) -> Iterator[tuple[str, str]]:
    """Yields (line, row) of the lines of JSON; blank lines are none."""
    with opened(file.path) as source:
        for number, end, value in json_objects(source, file.path, reading.most):
            text = (
                value if isinstance(value, Unread) else row_of(value, f"{file.path} line {number}")
            )
            if isinstance(text, Unread):
                reading.report.fault(*text)
            else:
                yield str(number), text
            if reading.stops(end):
                return


def conversation_arrow(file: File, reading: ReadRequest) -> Iterator[tuple[str, str]]:
    """Yields (row, row as JSON) of an Arrow stream."""
    row = 0
    try:
        known = set(stream_schema(file.path).names)
        fields = [field for field in FIELDS if field in known]
        for batch in record_batches(file.path, fields):
            yield from _rows(batch, row, file.path, reading)
            row += batch.num_rows
            if reading.report.cut_short:
                return
    except DataError:
        raise
    except FAULTS as error:
        reading.report.fault(*broken(file.path, row, error))


def conversation_table(file: File, reading: ReadRequest) -> Iterator[tuple[str, str]]:
    """Yields (row, row as JSON) of a Parquet file."""
    row = 0
    try:
        with (
            open(file.path, "rb") as source,
            parquet.ParquetFile(source, pre_buffer=False) as table,
        ):
            known = set(table.schema_arrow.names)
            fields = [field for field in FIELDS if field in known]
            for number in range(table.num_row_groups):
                group = table.metadata.row_group(number)
                rows = _rows_at_once(source, group, fields, reading.most)
                if isinstance(rows, Unread):
                    reading.report.fault(
                        rows.cause, f"{file.path} rows from {row} on: {rows.message}"
                    )
                    row += group.num_rows
                    continue
                for batch in table.iter_batches(rows, row_groups=[number], columns=fields):
                    yield from _rows(batch, row, file.path, reading)
                    row += batch.num_rows
                    if reading.report.cut_short:
                        return
    except DataError:
        raise
    except FAULTS as error:
        message = f"{file.path} is not a whole Parquet file: at row {row}: {reason(error)}"
        reading.report.fault("corrupt files", message)


def _rows_at_once(source: Any, group: Any, fields: list[str], most: int) -> int | Unread:
    """Returns how many rows of a group may be decoded at once, by the sizes of its pages."""
    rows = ROWS
    for number in range(group.num_columns):
        chunk = group.column(number)
        if chunk.path_in_schema.partition(".")[0] not in fields:
            continue
        within = pages(source, chunk)
        largest = max((page.size for page in within), default=0)
        if largest > most:
            return too_large("a page", largest, most)
        # Of a dictionary many rows may name the same large value.
        is_small = chunk.total_uncompressed_size * ROWS <= PIECE
        if chunk.has_dictionary_page and not is_small:
            return 1
        rows = min(rows, rows_at_once(within, ROWS, PIECE))
    return rows


def _rows(
    batch: pa.RecordBatch, first: int, path: str, reading: ReadRequest
) -> Iterator[tuple[str, str]]:
    """Yields (row, row as JSON) of a batch whose first row has the number `first`."""
    done = 0
    for number in range(batch.num_rows):
        place = f"{path} row {first + number}"
        part = batch.slice(number, 1)
        if part.nbytes > reading.most:
            reading.report.fault(*too_large(place, part.nbytes, reading.most))
            continue
        try:
            text = row_of(part.to_pylist()[0], place)
        except UnicodeDecodeError:
            text = Unread("rows not in UTF-8", f"{place} is not UTF-8 text")
        if isinstance(text, Unread):
            reading.report.fault(*text)
        else:
            yield str(first + number), text
        done += part.nbytes
        if reading.stops(done):
            return


class Conversations(Files):
    """Conversations, of which the answers are learned.

    The files are named as for data=files, or are those that `datasets` keeps of a data set: it is
    fetched once, and after that read from its cache, without a network too.

    A row has `messages` (each with role and content, or tool calls), `prompt` and `completion`
    (texts or messages), or `text`.

    Args:
        name: of a data set on the hub, or a folder in its layout; replaces `path`.
        subset, split, revision: of it, as in data=hub.
        loss_on: answers = tokens of prompts are read and not learned; all = every token is learned.
        chat_template: a Jinja file, or chatml; None = the tokenizer's own.
    """

    content_decides = (*Files.content_decides, "chat_template", *OF_A_NAME)
    readers = {
        ".jsonl": conversation_lines,
        ".jsonl.gz": conversation_lines,
        ".jsonl.zst": conversation_lines,
        ".parquet": conversation_table,
        ".arrow": conversation_arrow,
    }
    kind = "conversations"

    def __init__(
        self,
        *,
        path: str | None = None,
        name: str | None = None,
        subset: str | None = None,
        split: str = "train",
        revision: str | None = None,
        held_out_path: str | None = None,
        loss_on: Literal["answers", "all"] = "answers",
        chat_template: str | None = None,
        tokenizer: str = "bytes",
        pad_vocabulary_to: int = 1,
        held_out: float = 0.01,
        on_error: str = "raise",
        cache: str | None = None,
        max_document_bytes: int = MOST,
    ):
        if (path is None) == (name is None):
            raise ValueError(
                "data=conversations reads data.path, a glob such as data.path='chats/*.jsonl', or"
                f" data.name, a data set of the hub; path={path} and name={name} are given, and one"
                " of the two is needed"
            )
        if name is not None:
            check_name(name, subset, split, revision)
        elif (subset, split, revision) != (None, "train", None):
            raise ValueError(
                "data.subset, data.split and data.revision are of data.name, which is not given;"
                " leave them out, or name the data set"
            )
        super().__init__(
            path=path or name,
            held_out_path=held_out_path,
            tokenizer=tokenizer,
            pad_vocabulary_to=pad_vocabulary_to,
            held_out=held_out,
            on_error=on_error,
            cache=cache,
            max_document_bytes=max_document_bytes,
        )
        if loss_on not in ("answers", "all"):
            raise ValueError(f"data.loss_on={loss_on} is unknown; give answers or all")
        if chat_template is not None and not (isinstance(chat_template, str) and chat_template):
            raise ValueError(
                f"data.chat_template={chat_template!r} names no template; give a Jinja file,"
                " chatml, or null for the tokenizer's"
            )
        self.loss_on: Literal["answers", "all"] = loss_on
        self.chat_template = chat_template
        self.name = name
        self.subset = subset
        self.split = split
        self.revision = revision

    def apart(self) -> "Conversations | None":
        """See Local.apart."""
        held_out = super().apart()
        if not isinstance(held_out, Conversations):
            return None
        held_out.name = None
        return held_out

    def files(self) -> list[File]:
        """See Local.files."""
        if self.name is None:
            return super().files()
        paths = prepared_files(self.name, self.subset, self.split, self.revision)
        return [file_at(path, os.path.basename(path)) for path in paths]

    @property
    def sets_targets(self) -> bool:
        """See Source.sets_targets."""
        return self.loss_on == "answers"

    def tokenizer(self) -> Tokenizer:
        """See Source.tokenizer.

        Raises:
            ValueError: there is no chat template for it, or one that is no template.
        """
        tokenizer = super().tokenizer()
        template = self.template(cast(ChatTokenizer, tokenizer))
        if template.asks_for_date:
            words = f"the chat template is told that it is {template.date}, every day"
            tokenizer.remark = "; ".join(part for part in (tokenizer.remark, words) if part)
        return tokenizer

    def template(self, tokenizer: ChatTokenizer) -> ChatTemplate:
        """Returns the chat template of the conversations."""
        sources = dict(tokenizer.settings.templates)
        name = f"data.tokenizer={self.tokenizer_name}"
        if self.chat_template is not None:
            name = f"data.chat_template={self.chat_template}"
            sources = {"default": self._source(self.chat_template)}
        return ChatTemplate(sources, tokenizer.settings.special, tokenizer.endings, name)

    @staticmethod
    def _source(name: str) -> str:
        """Returns the text of data.chat_template."""
        if name in BUILT_IN:
            return BUILT_IN[name]
        try:
            return contents(Path(os.path.expanduser(name)), LARGEST_TEMPLATE).decode("utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"data.chat_template={name}: {reason(error)}; give a Jinja file, chatml, or null"
                " for the tokenizer's"
            ) from error

    def encoder(self, tokenizer: Tokenizer) -> DocumentEncoder:
        """See Local.encoder."""
        chat = cast(ChatTokenizer, tokenizer)
        return ConversationEncoder(chat, self.template(chat), self.loss_on)
