"""Documents out of a Parquet file: a row is a document."""

from collections.abc import Iterator

import pyarrow as pa
from pyarrow import parquet

from trainer.data.readers import File, Reading

ROWS = 256  # rows decoded at a time


def table(file: File, reading: Reading) -> Iterator[tuple[str, str]]:
    """(row, text) of every row that has text; only the text's column is read."""
    report, field, row, done = reading.report, reading.field, 0, 0
    try:
        with parquet.ParquetFile(file.path) as source:
            schema = source.schema_arrow
            if field not in schema.names:
                names = ", ".join(schema.names)
                message = f"{file.path} has no column {field!r} (it has: {names}); data.text_field names it"
                report.fault("files without text", message)
                return
            if not _holds_text(schema.field(field).type):
                kind = schema.field(field).type
                report.fault("files without text", f"{file.path}: column {field!r} is not text but {kind}")
                return
            for batch in source.iter_batches(ROWS, columns=[field]):
                for value in batch.column(0):
                    text = _cell(value, f"{file.path} row {row}", reading)
                    if text is not None:
                        yield str(row), text
                        done += len(text)
                    row += 1
                if reading.stops(done):
                    return
    except pa.ArrowException as error:
        report.fault("corrupt files", f"{file.path} is not a whole Parquet file ({error})")


def _cell(value: pa.Scalar, place: str, reading: Reading) -> str | None:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        reading.report.fault("rows not in UTF-8", f"{place} is not UTF-8 text at byte {error.start} of its text")
        return None
    if text is None:
        reading.report.fault("rows without text", f"{place}: field {reading.field!r} is null")
    return text


def _holds_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
