"""Documents out of one local file of text or JSON lines; each fault names the file and the place.

A file is read in bounded pieces: no line and no text of more than `data.max_document_bytes` is ever
held.
"""

import codecs
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from trainer.data.errors import DataError, ReadReport

MOST = 256 << 20  # bytes of a document, where the config says nothing else
PIECE = 1 << 20  # bytes of a line that are passed over at once
CHARACTERS = 1 << 20  # looked at together
TOO_LARGE = "documents too large"
CODECS = {".gz": "gzip", ".zst": "zstd"}  # as pyarrow calls them


@dataclass(frozen=True)
class File:
    """A file of the data.

    Attributes: path: where it lies. name: the one it keeps when the folder moves. size: bytes.
        stamp: time of change in ns. unreadable: why it cannot be read, where that is known before;
        the other facts are nothing then. folder: whether it is no file at all, but a folder whose
        name matches.
    """

    path: str
    name: str
    size: int
    stamp: int
    unreadable: str = ""
    folder: bool = False


@dataclass(frozen=True)
class ReadRequest:
    """The way a file is read.

    Attributes: field: that holds the text. report: takes the faults. limit: bytes after which to
        stop. most: bytes of a document.
    """

    field: str
    report: ReadReport
    limit: int | None = None
    most: int = MOST

    def stops(self, done: int) -> bool:
        """Tells if so many bytes are enough, and notes in the report that the rest is not seen."""
        if self.limit is None or done < self.limit:
            return False
        self.report.cut_short = True
        return True


class Unread(NamedTuple):
    """A document without its text: the plural noun it is counted under, and what is wrong with it,
    in the user's words."""

    cause: str
    message: str


class Line(NamedTuple):
    """One line of JSON: its number from 1, the bytes up to its end, and its text."""

    number: int
    end: int
    text: str | Unread


Reader = Callable[
    [File, ReadRequest], Iterator[tuple[str, str]]
]  # yields (place in the file, text)


def documents(
    file: File, reading: ReadRequest, readers: Mapping[str, Reader]
) -> Iterator[tuple[str, str]]:
    """(name, text) of every document of the file, in order; a name is unique among the data. No
    text is empty.

    readers: for each suffix that may be read, with its dot, how.
    """
    if _passed_over(file, reading.report, readers):
        return
    place = ""
    try:
        for place, text in readers[suffix_of(file.path)](file, reading):
            if text:
                yield (f"{file.name}#{place}" if place else file.name), text
            else:
                reading.report.empty += 1
    except DataError:
        raise
    # pyarrow raises OSError for a compressed file that is cut off, and errors of its own.
    except (OSError, MemoryError, pa.ArrowException) as error:
        behind = f" behind {place}" if place else ""
        reading.report.fault(
            "unreadable files", f"{file.path} cannot be read{behind} ({reason(error)})"
        )


def _passed_over(file: File, report: ReadReport, readers: Mapping[str, Reader]) -> bool:
    """Tell of a file that cannot be opened, or of which nothing would come."""
    if file.folder:
        report.passed("folders", f"{file.path} is a folder: a glob with ** has the files within it")
    elif file.unreadable:
        report.fault("unreadable files", f"{file.path} cannot be read ({file.unreadable})")
    elif (suffix := suffix_of(file.path)) not in readers:
        known = ", ".join(readers)
        report.fault(
            "files of another kind",
            f"{file.path} is of the kind {suffix or 'without suffix'}; read are {known}",
        )
    elif not file.size:
        report.fault("empty files", f"{file.path} is empty (0 bytes)")
    else:
        return False
    return True


def reason(error: BaseException) -> str:
    """Returns the message of an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = " ".join(str(error).split())
    return words[:300] if words else type(error).__name__


def suffix_of(path: str) -> str:
    """Returns the suffix of the file's name, in small letters and with its dot.

    Of a compressed file it has the suffix of what is compressed too, as in .jsonl.gz.
    """
    name = path.replace("\\", "/").rsplit("/", 1)[-1]
    stem, dot, last = name.rpartition(".")
    if not dot:
        return ""
    suffix = f".{last.lower()}"
    return suffix_of(stem) + suffix if suffix in CODECS else suffix


def too_large(place: str, size: int, most: int) -> Unread:
    """A document beyond data.max_document_bytes."""
    message = (
        f"{place} has {size} bytes, more than data.max_document_bytes={most}; split it, or give a"
        " larger limit"
    )
    return Unread(TOO_LARGE, message)


def whole(file: File, reading: ReadRequest) -> Iterator[tuple[str, str]]:
    """A text file is one document."""
    text = _decoded(file, reading)
    if isinstance(text, Unread):
        reading.report.fault(*text)
    else:
        yield "", text


def _decoded(file: File, reading: ReadRequest) -> str | Unread:
    """The text of a file. Its bytes are held no longer than until it is decoded."""
    if file.size > reading.most:
        return too_large(file.path, file.size, reading.most)
    with open(file.path, "rb") as source:
        raw = source.read(
            reading.most + 1 if reading.limit is None else min(reading.limit, reading.most + 1)
        )
    if len(raw) > reading.most:  # it has grown
        return too_large(file.path, len(raw), reading.most)
    try:
        # A reading with a limit may stop inside a character: only the file's end must be the end of
        # one.
        return codecs.getincrementaldecoder("utf-8")().decode(raw, final=len(raw) >= file.size)
    except UnicodeDecodeError as error:
        return Unread("files not in UTF-8", f"{file.path} is not UTF-8 text at byte {error.start}")


def opened(path: str) -> BinaryIO:
    """Opens a file to read, and decompresses one whose suffix says so piece by piece.

    Concatenated members of a compressed file are read one after another.
    """
    codec = CODECS.get(f".{path.rsplit('.', 1)[-1].lower()}")
    if codec is None:
        return open(path, "rb")
    # The wrapper gives lines with a largest length, which pyarrow's own files do not have.
    source: Any = pa.CompressedInputStream(pa.OSFile(path), codec)
    return io.BufferedReader(source, PIECE)


def lines(file: File, reading: ReadRequest) -> Iterator[tuple[str, str]]:
    """A line of JSON is a document; blank lines are none."""
    with opened(file.path) as source:
        for number, end, text in json_lines(source, file.path, reading.field, reading.most):
            if isinstance(text, Unread):
                reading.report.fault(*text)
            else:
                yield str(number), text
            del text
            if reading.stops(end):
                return


def json_lines(
    source: BinaryIO, name: str, field: str, most: int, number: int = 0, end: int = 0
) -> Iterator[Line]:
    """The lines of JSON of an opened file that are not blank, each with the text in its field.

    Args:
        source: stands behind line `number`, at byte `end`.
        name: of the file, for messages.
        most: bytes of a line. A longer one is passed over in pieces, none of which is kept.
    """
    objects = json_objects(source, name, most, number, end, spares_numbers=True)
    for line, after, value in objects:
        text = value
        if not isinstance(value, Unread):
            text = field_of(value, f"{name} line {line}", field)
        # The other fields are not held while the text is used.
        del value
        yield Line(line, after, text)
        del text


def json_objects(
    source: BinaryIO,
    name: str,
    most: int,
    number: int = 0,
    end: int = 0,
    *,
    spares_numbers: bool = False,
) -> Iterator[tuple[int, int, Any]]:
    """Yields (number, end, value) of the lines that are not blank; the value may be an Unread.

    Args:
        source, name, most, number, end: as for json_lines.
        spares_numbers: leaves numbers as they are written, so that none is made for nothing.
    """
    while raw := source.readline(most + 1):
        number += 1
        start = end
        end += len(raw)
        place = f"{name} line {number}"
        if len(raw) > most and not (len(raw) == most + 1 and raw.endswith(b"\n")):
            del raw
            end += _rest_of_line(source)
            yield number, end, too_large(place, end - start, most)
            continue
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if raw.isspace() or not raw:
            continue
        holder = [raw]
        del raw
        yield number, end, _value_of(holder, place, start, spares_numbers)


def _rest_of_line(source: BinaryIO) -> int:
    """Pass over what is left of a line; how many bytes that were."""
    passed = 0
    while piece := source.readline(PIECE):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed


class _Number(str):
    """A number as it is written: those of fields that nobody asked for are never made."""


def _value_of(holder: list[bytes], place: str, start: int, spares_numbers: bool) -> Any:
    """The value of one line of JSON, which is taken out of its holder so that it is not held
    twice."""
    try:
        words = holder.pop().decode("utf-8")
    except UnicodeDecodeError as error:
        return Unread(
            "lines not in UTF-8", f"{place} is not UTF-8 text at byte {start + error.start}"
        )
    try:
        if spares_numbers:
            return json.loads(words, parse_int=_Number, parse_float=_Number)
        return json.loads(words)
    except ValueError as error:
        return Unread("malformed lines", f"{place} is not JSON ({error})")
    except RecursionError:
        return Unread(
            "malformed lines",
            f"{place} is not JSON that can be read (lists within lists without end)",
        )


def field_of(value: Any, place: str, field: str) -> str | Unread:
    """The text in a field of what was read at a place."""
    if not isinstance(value, dict):
        return Unread("malformed lines", f"{place} is not a JSON object but {_kind(value)}")
    if field not in value:
        names = ", ".join(str(name)[:60] for name in list(value)[:20]) or "none"
        return Unread(
            "lines without text",
            f"{place} has no field {field!r} (it has: {names}); data.text_field names it",
        )
    text = value[field]
    if type(text) is not str:
        return Unread(
            "lines without text", f"{place}: field {field!r} is not text but {_kind(text)}"
        )
    if not sound(text):
        return Unread(
            "malformed lines",
            f"{place}: field {field!r} holds half a surrogate pair, which is no character",
        )
    return text


def _kind(value: Any) -> str:
    return "a number" if isinstance(value, _Number) else type(value).__name__


def sound(text: str) -> bool:
    """Reports that a text can be written as UTF-8.

    JSON can spell half of a surrogate pair, which cannot."""
    if text.isascii():
        return True
    try:
        for start in range(0, len(text), CHARACTERS):
            text[start : start + CHARACTERS].encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
