"""The texts of a data set's files of JSON or Parquet, one file after another, with a state from
which reading goes on.

The `datasets` library finds the files, wherever they are; it would then read every column, and cast
each to the type that it had in the first file. Here only the column of the text is read, in bounded
pieces, and a fault has its file and place.
"""

import io
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from datasets import StreamingDownloadManager
from datasets.utils.file_utils import xopen

from trainer.data.errors import DataError
from trainer.data.sources.parquet import cells
from trainer.data.sources.readers import Unread, field_of, json_lines, reason, suffix_of, too_large

START = {"file": 0, "member": 0, "row": 0, "end": 0}
BARE = (
    ".json",
    ".jsonl",
    ".ndjson",
    ".parquet",
    ".geoparquet",
    ".gpq",
)  # files that are not packed
BUFFER = 1 << 20


class At(NamedTuple):
    """Position of reading in a file: rows (or lines) read, and their bytes."""

    row: int
    end: int


class Rows:
    """The documents of a data set in the order of its files; {field: text}, or an Unread where a
    row has none.

    Args:
        files: paths or addresses. parquet: whether they are tables; else they are JSON. field: that
            holds the text.
        most: bytes of a document.
    """

    def __init__(self, files: Sequence[str], *, parquet: bool, field: str, most: int):
        self.files = files
        self.parquet = parquet
        self.field = field
        self.most = most
        self.state = dict(START)

    def state_dict(self) -> dict[str, Any]:
        """Returns the place at which the next document begins."""
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there. Raises DataError for the state of another reader."""
        if state_dict.keys() != START.keys() or not all(
            type(value) is int for value in state_dict.values()
        ):
            raise DataError(
                "the saved place in the data was written by another version of the reader; start"
                " the run anew, or go on with the version that began it"
            )
        self.state = dict(state_dict)

    def __iter__(self) -> Iterator[dict[str, str] | Unread]:
        while self.state["file"] < len(self.files):
            file = self.files[self.state["file"]]
            try:
                yield from self._of_file(file)
            except DataError:
                raise
            except Exception as error:  # packers and networks have errors of their own
                here = self.state["file"]
                row = self.state["row"]
                message = (
                    f"{file} cannot be read behind row {row} ({type(error).__name__}:"
                    f" {reason(error)})"
                )
                if (
                    "://" in file
                ):  # a network may have what it lacks the next time, so nothing is left out for it
                    raise DataError(
                        f"{message}; run the same command again: it goes on from its checkpoint"
                    ) from error
                self.state = START | {"file": here + 1}
                yield Unread("unreadable files", message)
                continue
            self.state = START | {"file": self.state["file"] + 1}

    def _of_file(self, file: str) -> Iterator[dict[str, str] | Unread]:
        for member, path in enumerate(_members(file)):
            if member < self.state["member"]:
                continue
            if member > self.state["member"]:
                self.state = START | {"file": self.state["file"], "member": member}
            name = file if path == file else f"{file} ({path.partition('::')[0]})"
            span = At(self.state["row"], self.state["end"])
            with xopen(path, "rb") as opened:
                source = _buffered(opened)
                texts = (
                    self._table(source, name, span)
                    if self.parquet
                    else self._json(source, name, span)
                )
                for after, text in texts:
                    self.state = self.state | {"row": after.row, "end": after.end}
                    yield text if isinstance(text, Unread) else {self.field: text}

    def _table(self, source: BinaryIO, name: str, span: At) -> Iterator[tuple[At, str | Unread]]:
        for row, text in cells(source, name, self.field, self.most, span.row):
            yield At(row + 1, 0), text

    def _json(
        self, source: io.BufferedReader, name: str, span: At
    ) -> Iterator[tuple[At, str | Unread]]:
        if source.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from self._list(source, name, span)
            return
        _go_to(source, span.end)
        for number, end, text in json_lines(
            source, name, self.field, self.most, span.row, span.end
        ):
            yield At(number, end), text

    def _list(self, source: BinaryIO, name: str, span: At) -> Iterator[tuple[At, str | Unread]]:
        """The objects, or texts, of a file that is one list."""
        raw = source.read(self.most + 1)
        if len(raw) > self.most:
            size = len(raw) + sum(len(piece) for piece in iter(lambda: source.read(BUFFER), b""))
            yield At(span.row + 1, 0), too_large(f"{name}, which is one list,", size, self.most)
            return
        try:
            items = json.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            yield (
                At(span.row + 1, 0),
                Unread("corrupt files", f"{name} is not JSON ({reason(error)})"),
            )
            return
        for number, item in enumerate(items):
            if number >= span.row:
                value = {"text": item} if isinstance(item, str) else item
                yield At(number + 1, 0), field_of(value, f"{name} item {number}", self.field)


def _members(file: str) -> Iterator[str]:
    """The file itself, or what is packed in it."""
    if suffix_of(file) in BARE:
        yield file
        return
    manager = StreamingDownloadManager()
    yield from manager.iter_files(manager.extract(file))


def _buffered(opened: Any) -> io.BufferedReader:
    """An opened file whose lines can be read up to a length, wherever it lies."""
    return opened if isinstance(opened, io.BufferedReader) else io.BufferedReader(opened, BUFFER)


def _go_to(source: BinaryIO, place: int) -> None:
    """Stand at a byte, also of a file that is unpacked as it is read."""
    try:
        source.seek(place)
    except (OSError, ValueError, NotImplementedError):
        left = place - source.tell()
        while left > 0 and (piece := source.read(min(left, BUFFER))):
            left -= len(piece)


def strangers(folder: str, files: Sequence[str]) -> dict[str, str]:
    """The files of a local folder that its data set leaves out, with the reason; none that describe
    it, and none hidden."""
    known = {os.path.abspath(file) for file in files}
    left_out = {}
    for above, folders, names in os.walk(
        folder, onerror=lambda error: left_out.update({str(error.filename): reason(error)})
    ):
        folders[:] = sorted(name for name in folders if name[0] not in "._")
        for name in sorted(names):
            path = os.path.abspath(os.path.join(above, name))
            if path in known or name[0] in "._" or name.lower().startswith(("readme", "license")):
                continue
            left_out[path] = (
                "it cannot be opened"
                if not os.path.exists(path)
                else "the library reads no such file with it"
            )
    return left_out
