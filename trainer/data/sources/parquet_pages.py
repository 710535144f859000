"""The sizes that the pages of a Parquet column say of themselves, read without unfolding any of
them.

The headers are in Thrift's compact protocol. A header begins with the fields 1 type, 2 size
unfolded, 3 size as it lies in the file, all of them whole numbers; what follows is passed over.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

HEADERS = (
    1 << 12,
    1 << 20,
)  # bytes of a header that are looked at: usually, and where statistics make it longer
STOP = 0
TRUE = 1
FALSE = 2
BYTE = 3
DOUBLE = 7
BINARY = 8
LIST = 9
SET = 10
MAP = 11
STRUCT = 12
DEPTH = 8  # structs within each other; a header has two
# fields of a page's header
UNFOLDED = 2
STORED = 3
DATA = 5
DATA_2 = 8
COUNT = 1  # the field of the header of a data page that has its number of values


class Page(NamedTuple):
    """A page of a column: how many values it has (a dictionary: none of the column's), and bytes
    once it is unfolded."""

    values: int
    size: int


class _Header:
    """A page header at the start of `raw`; `size` bytes long once `numbers` has read it."""

    def __init__(self, raw: bytes):
        self.raw = raw
        self.size = 0
        self.inner: dict[int, dict[int, int]] = {}

    def numbers(self) -> dict[int, int]:
        """The whole numbers among its own fields, by the field's number; those of its structs are
        then in `inner`.

        Raises ValueError where it is no header, IndexError where it goes on behind what there is.
        """
        return self._struct(0)

    def _struct(self, depth: int) -> dict[int, int]:
        if depth > DEPTH:
            raise ValueError("a page's header has structs without end")
        numbers: dict[int, int] = {}
        field = 0
        while (head := self._byte()) != STOP:
            field = field + (head >> 4) if head >> 4 else self._signed()
            if head & 15 == STRUCT:
                within = self._struct(depth + 1)
                if not depth:
                    self.inner[field] = within
                continue
            value = self._value(head & 15, depth)
            if value is not None:
                numbers[field] = value
        return numbers

    def _value(self, kind: int, depth: int) -> int | None:
        if BYTE < kind < DOUBLE:
            return self._signed()
        if kind in (BYTE, DOUBLE):
            self.size += 1 if kind == BYTE else 8
        elif kind == BINARY:
            length = self._unsigned()
            self.size += length
        elif kind == STRUCT:  # within a list
            self._struct(depth + 1)
        elif kind in (LIST, SET):
            head = self._byte()
            count = self._unsigned() if head >> 4 == 15 else head >> 4
            for _ in range(count):
                self._value(head & 15, depth + 1)
        elif kind not in (TRUE, FALSE):
            raise ValueError(f"a page's header has a field of the kind {kind}")
        return None

    def _byte(self) -> int:
        self.size += 1
        return self.raw[self.size - 1]

    def _unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a page's header has a number without end")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)


def pages(source: BinaryIO, chunk: Any) -> list[Page]:
    """The pages of a column chunk, in order. The file is left where it stood.

    Args:
        source: the opened file. chunk: `pyarrow.parquet.ColumnChunkMetaData`.

    Raises ValueError where the file holds no pages in that place.
    """
    place = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
        place = min(place, chunk.dictionary_page_offset)
    end = place + chunk.total_compressed_size
    pages = []
    back = source.tell()
    while place < end:
        header, numbers = _header(source, place)
        if numbers.get(UNFOLDED, -1) < 0 or numbers.get(STORED, -1) < 0:
            raise ValueError(f"no header of a page at byte {place}")
        data = header.inner.get(DATA) or header.inner.get(DATA_2) or {}
        pages.append(Page(max(data.get(COUNT, 0), 0), numbers[UNFOLDED]))
        place += header.size + numbers[STORED]
    source.seek(back)
    return pages


def _header(source: BinaryIO, place: int) -> tuple[_Header, dict[int, int]]:
    for length in HEADERS:
        source.seek(place)
        header = _Header(source.read(length))
        try:
            return header, header.numbers()
        except IndexError:
            continue
    raise ValueError(f"no header of a page at byte {place}")


def rows_at_once(chunk_pages: list[Page], most: int, bytes_at_once: int) -> int:
    """The largest of a few numbers of rows that never unfold to more than so many bytes together,
    or to one page.

    A dictionary is held whole while its rows are read, and counts for none of them.
    """
    data = [page for page in chunk_pages if page.values]
    rows = most
    while rows > 1 and any(size > bytes_at_once for size in _spans(data, rows)):
        rows //= 4
    return max(rows, 1)


def _spans(data: list[Page], rows: int) -> Iterator[int]:
    """Bytes of the pages that so many rows may touch, from each page's last row on; 0 where that is
    one page alone."""
    for first, page in enumerate(data):
        left = rows - 1
        size = page.size
        last = first
        while left > 0 and last + 1 < len(data):
            last += 1
            left -= data[last].values
            size += data[last].size
        yield size if last > first else 0
