"""Documents out of an Arrow stream, as `datasets` saves one with save_to_disk: a row is a document.

The file is mapped into memory, not read: only the pages of the text are ever loaded. Nothing in it
is run, and compressed bodies are refused, because a few bytes of one may unfold to gigabytes.
"""

import json
import os
import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from trainer.data.sources.parquet import FAULTS, cells_of, unfit
from trainer.data.sources.readers import DataError, File, ReadRequest, Unread, reason
from trainer.files.limited_reader import json_file

STATE = "state.json"  # lists the files of a saved data set
SPLITS = "dataset_dict.json"  # lists the folders of a saved DatasetDict
LARGEST_STATE = 16 << 20  # bytes of either
RECORD_BATCH_COMPRESSION = 3  # fields of the flatbuffers schema Message.fbs of Arrow, by number
MESSAGE_HEADER = 2


def read_arrow(file: File, reading: ReadRequest) -> Iterator[tuple[str, str]]:
    """Yields (row, text) of every row that has text."""
    done = 0
    for row, text in arrow_cells(file.path, reading.field, reading.most):
        if isinstance(text, Unread):
            reading.report.fault(*text)
        else:
            yield str(row), text
            done += len(text)
        del text
        if reading.stops(done):
            return


def arrow_cells(path: str, field: str, most: int) -> Iterator[tuple[int, str | Unread]]:
    """Yields (row, text or fault) of the rows of a file.

    Args:
        path: of the file, also for messages.
        field: the column of the text.
        most: bytes of a text.
    """
    row = 0
    try:
        wrong = unfit(stream_schema(path), path, field)
        if wrong is not None:
            yield 0, wrong
            return
        for batch in record_batches(path, [field]):
            yield from cells_of(iter([batch]), row, path, field, most)
            row += batch.num_rows
    except DataError:
        raise
    except FAULTS as error:
        yield row, broken(path, row, error)


def broken(path: str, row: int, error: BaseException) -> Unread:
    """Returns the fault of a file that is no whole Arrow stream."""
    message = f"{path} is not a whole Arrow stream: behind row {row}: {reason(error)}"
    return Unread("corrupt files", message)


def stream_schema(path: str) -> pa.Schema:
    """Returns the columns of a file."""
    with pa.memory_map(path) as source:
        return pa.ipc.open_stream(source).schema


def record_batches(path: str, fields: list[str]) -> Iterator[pa.RecordBatch]:
    """Yields the batches of a file with some of its columns, checked.

    Raises:
        ValueError: a body is compressed, or offsets point outside of it.
    """
    with pa.memory_map(path) as source:
        _refuse_compressed(source)
        source.seek(0)
        schema = pa.ipc.open_stream(source).schema
        source.seek(0)
        chosen = [schema.get_field_index(field) for field in fields]
        options = pa.ipc.IpcReadOptions(included_fields=chosen, use_threads=False)
        for batch in pa.ipc.open_stream(source, options=options):
            batch.validate()
            for column in batch.columns:
                _without_utf8(column).validate(full=True)
            yield batch


def _without_utf8(column: pa.Array) -> pa.Array:
    """Returns a column of text as one of bytes: a single text that is no UTF-8 is told by row."""
    if pa.types.is_string(column.type):
        return column.cast(pa.binary())
    if pa.types.is_large_string(column.type):
        return column.cast(pa.large_binary())
    return column


def _refuse_compressed(source: pa.NativeFile) -> None:
    """Raises ValueError for a stream with a compressed body."""
    for message in pa.ipc.MessageReader.open_stream(source):
        if message.type == "record batch" and _is_compressed(message.metadata.to_pybytes()):
            raise ValueError("its bodies are compressed; save it without compression")


def _is_compressed(metadata: bytes) -> bool:
    """Tells if the header of a record batch names a compression."""
    (root,) = struct.unpack_from("<I", metadata, 0)
    header = _field_at(metadata, root, MESSAGE_HEADER)
    if header is None:
        return False
    (offset,) = struct.unpack_from("<I", metadata, header)
    return _field_at(metadata, header + offset, RECORD_BATCH_COMPRESSION) is not None


def _field_at(buffer: bytes, table: int, number: int) -> int | None:
    """Returns the place of a field of a flatbuffers table; None where the table lacks it."""
    (back,) = struct.unpack_from("<i", buffer, table)
    (size,) = struct.unpack_from("<H", buffer, table - back)
    entry = 4 + 2 * number
    if entry + 2 > size:
        return None
    (offset,) = struct.unpack_from("<H", buffer, table - back + entry)
    return table + offset if offset else None


def is_saved(folder: str) -> bool:
    """Tells if `datasets` saved the folder with save_to_disk, as a data set or as several."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in (STATE, SPLITS))


def saved_files(folder: str, key: str) -> list[str]:
    """Returns the files of a saved data set, in its order.

    Args:
        folder: that save_to_disk wrote.
        key: the setting that names it, for messages.

    Raises:
        ValueError: it holds several data sets, or its list of files cannot be used.
    """
    if not os.path.isfile(os.path.join(folder, STATE)):
        listed = _json(os.path.join(folder, SPLITS), key).get("splits")
        splits = [split for split in listed if _is_name(split)] if isinstance(listed, list) else []
        if not splits:
            raise ValueError(f"{key}={folder}: its {SPLITS} names no split; save the data again")
        raise ValueError(
            f"{key}={folder}: it holds the splits {', '.join(splits)}; name one, as"
            f" {key}={folder.rstrip('/')}/{splits[0]}"
        )
    state = _json(os.path.join(folder, STATE), key)
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{key}={folder}: its rows are chosen by a separate file of indices; save it again"
            " after flatten_indices()"
        )
    entries = state.get("_data_files")
    names: list[Any] = []
    for entry in entries if isinstance(entries, list) else []:
        names.append(entry.get("filename") if isinstance(entry, dict) else None)
    if not names or not all(_is_name(name) for name in names):
        raise ValueError(
            f"{key}={folder}: its {STATE} does not list the files within it; save the data again"
        )
    return [os.path.join(folder, name) for name in names]


def _is_name(name: Any) -> bool:
    """Tells if a value is the name of something directly within a folder."""
    plain = isinstance(name, str) and name not in ("", ".", "..")
    return plain and "/" not in name and "\0" not in name


def _json(path: str, key: str) -> dict[str, Any]:
    try:
        value = json_file(os.fspath(path), LARGEST_STATE)
    except (OSError, ValueError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{key}={os.path.dirname(path)}: {os.path.basename(path)} cannot be read"
            f" ({reason(error)}); save the data again"
        ) from error
    return value if isinstance(value, dict) else {}
