"""Documents out of a Parquet file: a row is a document.

Only the text's column is read, a few rows at a time: a file of kilobytes may unfold to gigabytes,
by its dictionary (one value that stands for many rows) or by its compression. The first is not
unfolded; of the second the size that each page says of itself is looked at before the page is.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from trainer.data.sources.parquet_pages import pages, rows_at_once
from trainer.data.sources.readers import (
    TOO_LARGE,
    DataError,
    File,
    ReadRequest,
    Unread,
    reason,
    too_large,
)

ROWS = 256  # rows decoded at a time, at most
PIECE = 32 << 20  # bytes decoded at a time, where no page has more by itself
SLACK = 1 << 16  # bytes of a page beside those of its only text
BUFFER = 1 << 20  # bytes of a column read from the file at a time
DICTIONARY = {"PLAIN_DICTIONARY", "RLE_DICTIONARY"}
PLAIN = {"PLAIN", "RLE", "BIT_PACKED"}
LENGTHS = {
    "DELTA_LENGTH_BYTE_ARRAY",
    "DELTA_BINARY_PACKED",
}  # as PLAIN, but nothing can be kept folded beside them
FAULTS = (
    pa.ArrowException,
    OSError,
    MemoryError,
    ValueError,
    RuntimeError,
)  # that the library raises for a spoilt file


class RowText(NamedTuple):
    """The text of one row, by its number from 0. A group of rows that cannot be read is one cell,
    its last row's."""

    row: int
    text: str | Unread


def read_table(file: File, reading: ReadRequest) -> Iterator[tuple[str, str]]:
    """(row, text) of every row that has text."""
    done = 0
    with open(file.path, "rb") as source:
        for row, text in cells(source, file.path, reading.field, reading.most):
            if isinstance(text, Unread):
                reading.report.fault(*text)
            else:
                yield str(row), text
                done += len(text)
            del text
            if reading.stops(done):
                return


def cells(source: BinaryIO, name: str, field: str, most: int, first: int = 0) -> Iterator[RowText]:
    """The texts of an opened Parquet file from row `first` on, those at fault among them.

    Args:
        name: of the file, for messages.
        most: bytes of a text.
    """
    row = first
    try:
        metadata = parquet.read_metadata(source)
        wrong = unfit(metadata.schema.to_arrow_schema(), name, field)
        if wrong is not None:
            if not first:
                yield RowText(0, wrong)
            return
        column = metadata.schema.names.index(field)
        folded = _stays_folded(metadata, column)
        settings: dict[str, Any] = {
            "metadata": metadata,
            "buffer_size": BUFFER,
            "pre_buffer": False,
        }
        with parquet.ParquetFile(
            source, read_dictionary=[field] if folded else None, **settings
        ) as opened:
            end = 0
            for number in range(opened.num_row_groups):
                group = opened.metadata.row_group(number)
                begin = end
                end += group.num_rows
                if row >= end:
                    continue
                rows = _rows(source, group.column(column), most, folded)
                if isinstance(rows, TooLarge):
                    row = end
                    yield RowText(
                        end - 1,
                        _page_too_large(f"{name} rows {begin} to {end - 1}", rows.size, most),
                    )
                    continue
                batches = opened.iter_batches(rows, row_groups=[number], columns=[field])
                for cell in cells_of(batches, begin, name, field, most):
                    if cell.row >= row:
                        row = cell.row + 1
                        yield cell
    except DataError:
        raise
    except FAULTS as error:
        yield RowText(
            row,
            Unread(
                "corrupt files",
                f"{name} is not a whole Parquet file: at row {row}: {reason(error)}",
            ),
        )


def unfit(schema: pa.Schema, name: str, field: str) -> Unread | None:
    if field not in schema.names:
        names = ", ".join(schema.names)
        message = f"{name} has no column {field!r} (it has: {names}); data.text_field names it"
        return Unread("files without text", message)
    if not _holds_text(schema.field(field).type):
        return Unread(
            "files without text",
            f"{name}: column {field!r} is not text but {schema.field(field).type}",
        )
    return None


class TooLarge(NamedTuple):
    """The bytes of a page that is not unfolded."""

    size: int


def _stays_folded(metadata: Any, column: int) -> bool:
    """Says whether the library can, and need, give the rows of a column as numbers into its
    dictionary."""
    chunks = [
        metadata.row_group(number).column(column) for number in range(metadata.num_row_groups)
    ]
    encodings = {encoding for chunk in chunks for encoding in chunk.encodings}
    return bool(encodings & DICTIONARY) and encodings <= PLAIN | DICTIONARY


def _rows(source: BinaryIO, chunk: Any, most: int, folded: bool) -> int | TooLarge:
    """Returns the rows of a column chunk to decode at a time.

    One, where an encoding lets a few bytes stand for many."""
    if not folded and not set(chunk.encodings) <= PLAIN | LENGTHS:
        return 1
    if chunk.total_uncompressed_size <= most:
        return ROWS
    within = pages(source, chunk)
    largest = max(page.size for page in within)
    if largest > most + SLACK:
        return TooLarge(largest)
    return rows_at_once(within, ROWS, min(PIECE, most))


def _page_too_large(place: str, size: int, most: int) -> Unread:
    message = (
        f"{place}: a page of them unfolds to {size} bytes, more than data.max_document_bytes={most}"
    )
    return Unread(
        TOO_LARGE, f"{message}; write the file with smaller pages, or give a larger limit"
    )


def cells_of(
    batches: Iterator[pa.RecordBatch], row: int, name: str, field: str, most: int
) -> Iterator[RowText]:
    for batch in batches:
        column = batch.column(0)
        places = column.indices if pa.types.is_dictionary(column.type) else None
        words = column.dictionary if places is not None else column
        if places is not None and not _within(places, len(words)):
            raise ValueError("a row points outside of its dictionary")
        sizes = pc.call_function("binary_length", [words.cast(_bytes_of(words.type))])
        for number in range(len(column)):
            span = number if places is None else places[number].as_py()
            yield RowText(row, _text(words, sizes, span, f"{name} row {row}", field, most))
            row += 1


def _within(places: pa.Array, size: int) -> bool:
    bounds = pc.call_function("min_max", [places]).as_py()
    return bounds["min"] is None or 0 <= bounds["min"] <= bounds["max"] < size


def _text(
    words: pa.Array, sizes: pa.Array, span: int | None, place: str, field: str, most: int
) -> str | Unread:
    size = None if span is None else sizes[span].as_py()
    if size is None:
        return Unread("rows without text", f"{place}: field {field!r} is null")
    if size > most:
        return too_large(place, size, most)
    try:
        return words[span].as_py()
    except UnicodeDecodeError as error:
        return Unread(
            "rows not in UTF-8", f"{place} is not UTF-8 text at byte {error.start} of its text"
        )


def _bytes_of(kind: pa.DataType) -> pa.DataType:
    """The type of the same bytes without the promise that they are UTF-8."""
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    return pa.binary_view() if pa.types.is_string_view(kind) else pa.binary()


def _holds_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )
