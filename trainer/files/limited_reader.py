"""Reads the JSON and YAML files of runs, reports and exports as plain data within limits.

A file may be a stranger's, or what a broken disk left. Within the limits nothing that is read can
fill the memory, exhaust the stack of whoever walks over it, or overflow where a number becomes a
tensor. Every fault is an `Unreadable` with the name of the file and the place in it; that a file is
not there stays the FileNotFoundError that it is.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import yaml

# lists and groups within each other: ours have ten at most, and whoever walks over them recurses
DEPTH = 64
VALUES = 200_000  # of a YAML file, each alias counted with all that it stands for
YAML_BYTES = 1 << 20
JSON_BYTES = 16 << 20
MANIFEST_BYTES = 256 << 20  # that of a large model has some tens of MB
LINE_BYTES = 16 << 20
# a signed word of 64 bits; the state of a generator of random numbers
SMALLEST = -(1 << 63)
LARGEST = (1 << 128) - 1
DIGITS = 40  # of a whole number, at most; one of more digits is not even converted
SHOWN = 60  # characters of a file that a message quotes

_Loader = getattr(
    yaml, "CSafeLoader", yaml.SafeLoader
)  # events alone are taken from it: those do not recurse


class Unreadable(ValueError):
    """A file is not what it should be; the message is for the user."""


def contents(path: Path | str, most: int = JSON_BYTES, follow: bool = True) -> bytes:
    """The bytes of an ordinary file of at most `most` bytes; `follow` says whether it may be a
    symbolic link.

    Raises:
        Unreadable: it is a pipe, a device or a folder, or larger.
        OSError: it is not there or may not be read.
    """
    # A pipe without a writer would be waited for without end.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Unreadable(
                f"{path} is a symbolic link, which is not followed; remove it"
            ) from error
        raise
    with open(handle, "rb") as source:
        facts = os.fstat(source.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise Unreadable(f"{path} is no ordinary file; remove it")
        raw = source.read(most + 1) if facts.st_size <= most else b""
    if facts.st_size > most or len(raw) > most:
        raise Unreadable(
            f"{path} has {max(facts.st_size, len(raw))} bytes; such a file has at most {most}"
        )
    return raw


def json_file(path: Path | str, most: int = JSON_BYTES, follow: bool = True) -> Any:
    """Returns the value of a JSON file. Raises Unreadable or OSError."""
    return json_value(contents(path, most, follow), str(path))


def json_object(path: Path | str, most: int = JSON_BYTES, follow: bool = True) -> dict[str, Any]:
    """Returns the object of a JSON file. Raises Unreadable (also for another value) or OSError."""
    value = json_file(path, most, follow)
    if not isinstance(value, dict):
        raise Unreadable(f"{path} holds no JSON object but {type(value).__name__}")
    return value


def json_value(text: bytes | str, name: str) -> Any:
    """Returns the value of a JSON text; `name` is its source, for messages.

    Raises Unreadable where it is no JSON, is too deep or has a number that nothing here can be.
    """
    try:
        value = json.loads(text, parse_int=_whole, parse_float=_fraction)
    except RecursionError:
        raise Unreadable(f"{name} has lists within lists more than {DEPTH} deep") from None
    except UnicodeDecodeError as error:
        raise Unreadable(f"{name} is not UTF-8 text at byte {error.start}") from error
    except ValueError as error:
        raise Unreadable(f"{name} is not JSON ({error})") from error
    _walk(value, name)
    return value


def yaml_file(path: Path | str, follow: bool = True) -> Any:
    """Returns the value of a YAML file as `yaml.safe_load` does. Raises Unreadable or OSError."""
    return yaml_value(contents(path, YAML_BYTES, follow), str(path))


def yaml_value(text: bytes | str, name: str) -> Any:
    """Returns the value of a YAML text; `name` is its source, for messages.

    Raises Unreadable where it is no YAML, is too deep, or has aliases that unfold to more than
    VALUES values.
    """
    with _in_words(name):
        words = text.decode("utf-8") if isinstance(text, bytes) else text
        _unfold(words, name)
        value = yaml.safe_load(words)
    _walk(value, name)
    return value


def vet_yaml(path: Path | str) -> None:
    """Raises Unreadable for a YAML file that `yaml_file` would refuse for its form.

    It builds no values, which takes a tenth of the time: for files that another library reads.
    """
    with _in_words(str(path)):
        _unfold(contents(path, YAML_BYTES).decode("utf-8"), str(path))


@contextmanager
def _in_words(name: str) -> Iterator[None]:
    """Turns the errors of the YAML library into Unreadable."""
    try:
        yield
    except Unreadable:
        raise
    except UnicodeDecodeError as error:
        raise Unreadable(f"{name} is not UTF-8 text at byte {error.start}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" line {mark.line + 1}" if mark is not None else ""
        raise Unreadable(f"{name}{place} is not YAML ({error.problem})") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        # Besides its own errors the library lets those through that a date or a number of
        # impossible size raises.
        raise Unreadable(f"{name} is not YAML ({' '.join(str(error).split())[:200]})") from error


def lines(source: BinaryIO, most: int = LINE_BYTES) -> Iterator[tuple[bytes, int]]:
    """(line with its end, bytes that it has); of a line of more than `most` bytes only the first
    `most` + 1.

    What is longer is read on in pieces of that size, of which none is kept.
    """
    while raw := source.readline(most + 1):
        length = len(raw)
        end = raw
        while len(end) == most + 1 and not end.endswith(b"\n"):
            end = source.readline(most + 1)
            length += len(end)
        yield raw, length


def _unfold(text: str, name: str) -> None:
    """Counts the values and the depth of a YAML text without building any of them."""
    open_at: list[tuple[str | None, int]] = []  # anchor, and values counted before it
    sizes: dict[str, int] = {}
    depths: dict[str, int] = {}
    deepest: list[int] = []
    count = 0
    for event in yaml.parse(text, _Loader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in [anchor for anchor, _ in open_at]:
                raise Unreadable(
                    f"{name} line {line}: *{event.anchor} stands for what it is itself a part of"
                )
            count += sizes.get(event.anchor, 1)
            depth = len(open_at) + depths.get(event.anchor, 0)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_at.append((event.anchor, count))
            deepest.append(len(open_at))
            count += 1
            depth = len(open_at)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_at.pop()
            depth = deepest.pop()
            if anchor is not None:
                sizes[anchor] = count - before
                depths[anchor] = depth - len(open_at)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            depth = len(open_at)
            if event.anchor is not None:
                sizes[event.anchor] = 1
        else:
            continue
        if deepest:
            deepest[-1] = max(deepest[-1], depth)
        if depth > DEPTH:
            raise Unreadable(
                f"{name} line {line} has lists or groups within each other more than {DEPTH} deep"
            )
        if count > VALUES:
            raise Unreadable(f"{name} line {line}: it unfolds to more than {VALUES} values")


def _whole(digits: str) -> int:
    number = int(digits) if len(digits) <= DIGITS else LARGEST + 1
    if not SMALLEST <= number <= LARGEST:
        raise ValueError(f"the whole number {_short(digits)} is out of range")
    return number


def _fraction(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {_short(digits)} is out of range")
    return number


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... of {len(text)} characters"


def _walk(value: Any, name: str) -> None:
    """Raises Unreadable for a value that is too deep or a number that is too large."""
    level = [value]
    for _ in range(DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list | tuple | set):
                below.extend(item)
            elif isinstance(item, int) and not SMALLEST <= item <= LARGEST:
                raise Unreadable(
                    f"{name} has a whole number of {item.bit_length()} bits, which is out of range"
                )
        level = below
        if not level:
            return
    raise Unreadable(f"{name} has lists within lists more than {DEPTH} deep")
