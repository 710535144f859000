"""Documents out of one local file of text or JSON lines; each fault names the file and the place."""

import codecs
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from trainer.data.faults import Report


@dataclass(frozen=True)
class File:
    """A file of the data: where it lies, the name it keeps when the folder moves, bytes, time of change in ns."""

    path: str
    name: str
    size: int
    stamp: int


@dataclass(frozen=True)
class Reading:
    """How a file is read: the field that holds the text, whom faults are told, and after how many bytes to stop."""

    field: str
    report: Report
    limit: int | None = None

    def stops(self, done: int) -> bool:
        return self.limit is not None and done >= self.limit


Reader = Callable[[File, Reading], Iterator[tuple[str, str]]]  # yields (place in the file, text)


def documents(file: File, reading: Reading, readers: Mapping[str, Reader]) -> Iterator[tuple[str, str]]:
    """(name, text) of every document of the file, in order; a name is unique among the data. No text is empty.

    readers: for each suffix that may be read, with its dot, how.
    """
    suffix = suffix_of(file.path)
    if suffix not in readers:
        message = f"{file.path} has none of the suffixes that can be read ({', '.join(readers)})"
        reading.report.fault("files of another kind", message)
        return
    if not file.size:
        reading.report.fault("empty files", f"{file.path} is empty (0 bytes)")
        return
    try:
        for place, text in readers[suffix](file, reading):
            if text:
                yield (f"{file.name}#{place}" if place else file.name), text
            else:
                reading.report.empty += 1
    except OSError as error:
        reading.report.fault("unreadable files", f"{file.path} cannot be read ({error})")


def suffix_of(path: str) -> str:
    """What follows the last dot of the file's name, in small letters and with the dot."""
    name = path.replace("\\", "/").rsplit("/", 1)[-1]
    return f".{name.rsplit('.', 1)[-1].lower()}" if "." in name else ""


def whole(file: File, reading: Reading) -> Iterator[tuple[str, str]]:
    """A text file is one document."""
    with open(file.path, "rb") as source:
        raw = source.read() if reading.limit is None else source.read(reading.limit)
    try:
        # A reading with a limit may stop inside a character: only the file's end must be the end of one.
        text = codecs.getincrementaldecoder("utf-8")().decode(raw, final=len(raw) >= file.size)
    except UnicodeDecodeError as error:
        reading.report.fault("files not in UTF-8", f"{file.path} is not UTF-8 text at byte {error.start}")
    else:
        yield "", text


def lines(file: File, reading: Reading) -> Iterator[tuple[str, str]]:
    """A line of JSON is a document; blank lines are none."""
    done = 0
    with open(file.path, "rb") as source:
        for number, raw in enumerate(source, 1):
            body = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if body.strip():
                text = _line(body, f"{file.path} line {number}", done, reading)
                if text is not None:
                    yield str(number), text
            done += len(raw)
            if reading.stops(done):
                return


def _line(raw: bytes, place: str, start: int, reading: Reading) -> str | None:
    """The text of one line of JSON, or None where it is at fault and faults are counted."""
    report, field = reading.report, reading.field
    try:
        found = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        report.fault("lines not in UTF-8", f"{place} is not UTF-8 text at byte {start + error.start}")
        return None
    except (ValueError, RecursionError) as error:
        report.fault("malformed lines", f"{place} is not JSON ({error})")
        return None
    if not isinstance(found, dict):
        report.fault("malformed lines", f"{place} is not a JSON object but {type(found).__name__}")
    elif field not in found:
        names = ", ".join(map(str, found)) or "none"
        report.fault(
            "lines without text", f"{place} has no field {field!r} (it has: {names}); data.text_field names it"
        )
    elif not isinstance(found[field], str):
        report.fault("lines without text", f"{place}: field {field!r} is not text but {type(found[field]).__name__}")
    elif not sound(found[field]):
        report.fault("malformed lines", f"{place}: field {field!r} holds half a surrogate pair, which is no character")
    else:
        return found[field]
    return None


def sound(text: str) -> bool:
    """Whether a text can be written as UTF-8; JSON can spell half of a surrogate pair, which cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
