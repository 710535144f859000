"""Texts of the command line: a setting that is a text keeps exactly what was typed.

Hydra's grammar reads 2024_11_27 as a number, 1e3 as 1000.0, and stops at a comma, a colon or an
umlaut. So values of keys
that are texts never meet it: marks are composed in their place, and the texts are put back
afterwards.
"""

import inspect
import re
import shlex
import types
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException
from pydantic import BaseModel

from trainer.config.node_checks import find_class
from trainer.config.schema import ComponentConfig, Config
from trainer.config.values import annotations
from trainer.errors import UserError

TARGET = "_target_"
TEXT = "text"
TEXTS = "texts"
MARK = re.compile(r"LONGSPAN-TEXT-(\d+)-END")
LISTS = (list, tuple, Sequence, AbstractSet, set, frozenset)
CALL = re.compile(
    r"(choice|range|interval|glob|sort|shuffle|tag|int|float|str|bool|json_str|extend_list)\(.*\)",
    re.DOTALL,
)
NULL = "null"
MISSING = ("???", "'???'", '"???"')  # a value that is not set yet, to OmegaConf


class Texts:
    """The texts of one command line.

    Args:
        given: raw values by key, as they were typed.
        composed: the tree that the chosen groups make, asked only where a class must be known.
    """

    def __init__(self, given: Mapping[str, str], composed: Callable[[], Mapping[str, Any]]):
        self.given = given
        self.composed = composed
        self.texts: list[str] = []

    def spelled(self, key: str, raw: str) -> str:
        """Returns the value that Hydra is to read in place of a typed one."""
        kind = self._kind(key)
        if kind == TEXTS and raw.startswith("[") and raw.endswith("]"):
            return f"[{','.join(self._mark(unquoted(part)) for part in split(raw[1:-1]))}]"
        if kind is None or (kind == TEXTS and is_readable(raw)):
            return raw if is_readable(raw) else self._mark(raw)
        if raw == NULL or (_reads_as_itself(raw) and "${" not in raw and raw not in MISSING):
            return raw
        return self._mark(unquoted(raw))

    def swept(self, key: str, raw: str) -> str | None:
        """Returns the same for a sweep, where a comma parts values; None where it is ambiguous."""
        if key.startswith("hydra."):
            return raw if is_readable(raw) else quoted(raw)
        if self._kind(key) != TEXT or CALL.fullmatch(raw):
            return raw
        parts = split(raw)
        if any(part[:1] in "[{" for part in parts if part) or (
            len(parts) > 1 and not is_readable(raw)
        ):
            return raw if is_readable(raw) else None
        return ",".join(
            part if part == NULL or _reads_as_itself(part) else quoted(part) for part in parts
        )

    def may_be_one(self, key: str) -> bool:
        """Tells whether a text is among the values that a key takes, or may be."""
        try:
            annotation = self._annotation(key.split("."))
        except (UserError, TypeError, ValueError, ImportError, AttributeError):
            return False
        return annotation in (None, Any, inspect.Parameter.empty) or str in leaves(annotation)

    def restored(self, value: Any) -> Any:
        """Returns a composed tree, or a message, with the texts in place of their marks."""
        if isinstance(value, dict):
            return {key: self.restored(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.restored(inner) for inner in value]
        if isinstance(value, str):
            return MARK.sub(lambda match: self.texts[int(match[1])], value)
        return value

    def _mark(self, text: str) -> str:
        self.texts.append(text)
        return f"'LONGSPAN-TEXT-{len(self.texts) - 1}-END'"

    def _kind(self, key: str) -> str | None:
        """Returns whether a key is a text or a list of texts."""
        if key.endswith(f".{TARGET}"):
            return TEXT
        try:
            return kind_of(self._annotation(key.split(".")))
        except (UserError, TypeError, ValueError, ImportError, AttributeError):  # judged elsewhere
            return None

    def _annotation(self, path: Sequence[str]) -> Any:
        """Returns the annotation of a key; None where it has none."""
        part: Any = Config
        for place, name in enumerate(path):
            known = {info.alias or key: info for key, info in part.model_fields.items()}
            if name not in known:
                return self._of_node(path) if issubclass(part, ComponentConfig) else None
            annotation = known[name].annotation
            if place == len(path) - 1:
                return annotation
            inner = [
                kind
                for kind in leaves(annotation)
                if isinstance(kind, type) and issubclass(kind, BaseModel)
            ]
            if not inner:
                return None
            part = inner[0]
            if get_origin(annotation) is dict:  # of nodes by label
                return self._of_node(path) if len(path) > place + 2 else None
        return None

    def _of_node(self, path: Sequence[str]) -> Any:
        """Returns the annotation of a setting of the innermost node on the way to it."""
        for cut in range(len(path) - 1, 0, -1):
            target = self._target(path[:cut])
            if target is not None:
                return (
                    annotations(find_class(target, ".".join(path[:cut]))).get(path[cut])
                    if cut == len(path) - 1
                    else None
                )
        return None

    def _target(self, path: Sequence[str]) -> str | None:
        """Returns the class that the node in a place names, given or in the chosen groups."""
        key = ".".join([*path, TARGET])
        if key in self.given:
            return unquoted(self.given[key])
        here: Any = self.composed()
        for name in path:
            here = here.get(name) if isinstance(here, Mapping) else None
        target = here.get(TARGET) if isinstance(here, Mapping) else None
        return target if isinstance(target, str) else None


def kind_of(annotation: Any) -> str | None:
    """Returns TEXT for an annotation of texts, TEXTS for a list of them, else None."""
    plain = [kind for kind in leaves(annotation) if kind is not type(None)]
    if not plain:
        return None
    lists = [kind for kind in plain if get_origin(kind) in LISTS]
    words = [
        kind for kind in plain if kind is str or (isinstance(kind, type) and issubclass(kind, Path))
    ]
    if len(words) == len(plain):
        return TEXT
    inner = [kind_of(part) for kind in lists for part in get_args(kind) if part is not Ellipsis]
    if lists and len(lists) + len(words) == len(plain) and all(part == TEXT for part in inner):
        return TEXTS
    return None


def leaves(annotation: Any) -> list[Any]:
    """Returns the kinds of value that an annotation allows."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return [leaf for part in get_args(annotation) for leaf in leaves(part)]
    if origin is Annotated:
        return leaves(get_args(annotation)[0])
    if origin is Literal:
        return [type(value) for value in get_args(annotation)]
    if origin is dict:
        return leaves(get_args(annotation)[1])
    return [annotation]


def is_readable(raw: str) -> bool:
    """Tells whether Hydra's grammar can read a value."""
    try:
        OverridesParser.create().parse_override(f"key={raw}")
    except HydraException:
        return False
    return True


def _reads_as_itself(raw: str) -> bool:
    """Tells whether Hydra's grammar reads a value, without its quotes, as it was typed."""
    try:
        return OverridesParser.create().parse_override(f"key={raw}").value() == unquoted(raw)
    except HydraException:
        return False


def unquoted(raw: str) -> str:
    """Returns a value without the quotes that enclose it as a whole."""
    if len(raw) < 2 or raw[0] not in "'\"" or raw[-1] != raw[0]:
        return raw
    try:
        value = OverridesParser.create().parse_override(f"key={raw}")._value
    except HydraException:
        return raw
    return value.text if isinstance(value, QuotedString) else raw


def quoted(text: str) -> str:
    """Returns a text as Hydra's grammar reads it, whatever it holds."""
    doubled = re.sub(r"\\+(?='|$)", lambda match: match[0] * 2, text)
    return "'" + doubled.replace("'", "\\'") + "'"


def for_shell(text: str) -> str:
    """Returns a word to be copied into a shell, in double quotes where they protect it."""
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'


def split(raw: str) -> list[str]:
    """Returns the parts between commas that stand outside quotes and brackets."""
    parts = [""]
    depth = 0
    quote = ""
    for place, letter in enumerate(raw):
        before = raw[:place]
        escaped = (len(before) - len(before.rstrip("\\"))) % 2 == 1
        if quote:
            quote = "" if letter == quote and not escaped else quote
        elif letter in "'\"" and not parts[-1].strip():
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if letter == "," and not quote and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    parts = [part.strip() for part in parts]
    return [] if parts == [""] else parts
