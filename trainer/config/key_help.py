"""Meaning of a key of the config, from its comment in conf/, from the schema, or from its class.

One source for `--help`, for completion and for the test that no key is without a description. A
comment behind a key in the yaml of the chosen member counts most, then the description of a field
of the schema, then what the class's docstring says under Args.
"""

import inspect
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from models.ranges import Range
from trainer.config import groups
from trainer.config.node_checks import find_class, parameters
from trainer.config.schema import Config
from trainer.config.values import TARGET, annotations, quoted_value
from trainer.errors import UserError
from trainer.files.limited_reader import yaml_file

COMMENT = re.compile(
    r"^(?P<indent> *)(?P<key>[A-Za-z_]\w*): *(?P<value>.*?)(?: +# ?(?P<text>.*))?$"
)
ENTRY = re.compile(r"^(?P<names>\w+(?:, \w+)*): +(?P<text>.*)$")
TYPES: dict[Any, str] = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}
# Of pydantic's constraints.
BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


@dataclass(frozen=True)
class KeyHelp:
    """All that is known of one key.

    Attributes:
        key: dotted.
        default: as the command line writes it; empty where it must be set.
        kind: type and range, or the choices.
        meaning: one sentence; empty where nobody wrote one.
    """

    key: str
    default: str
    kind: str
    meaning: str

    def lines(self, width: int) -> list[str]:
        """Returns the entry of a help text, with the meaning from column `width` on."""
        head = f"    {f'{self.key} ({self.default})':{width}}  {self.meaning}".rstrip()
        return [head, f"    {'':{width}}  {self.kind}"] if self.kind else [head]


@cache
def yaml_comments(path: Path) -> Mapping[str, str]:
    """Returns the comments of a yaml file by dotted key: behind a key, or in front of it alone."""
    comments: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = COMMENT.match(line)
        if match is None:
            continue
        indent = len(match["indent"])
        while above and above[-1][0] >= indent:
            above.pop()
        above.append((indent, match["key"]))
        if match["text"]:
            comments[".".join(key for _, key in above)] = match["text"].strip()
    return comments


def inherited(path: Path) -> list[Path]:
    """Returns a yaml file and those of its folder that its defaults name, the nearest first."""
    found = [path]
    for name in re.findall(r"^ +- (\w+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
        other = path.with_name(f"{name}.yaml")
        if name != "_self_" and other.is_file() and other != path:
            found += inherited(other)
    return found


@cache
def documented_arguments(kind: type) -> Mapping[str, str]:
    """Returns what the docstrings of a class and its bases say of each argument."""
    meanings: dict[str, str] = {}
    for base in kind.__mro__:
        text = inspect.cleandoc(base.__doc__ or "")
        if "Args:" not in text:
            continue
        names: list[str] = []
        for line in text.partition("Args:")[2].splitlines()[1:]:
            if line and not line.startswith(" "):
                break
            entry = ENTRY.match(line.removeprefix("    "))
            if entry and not line.startswith("     "):
                names = entry["names"].split(", ")
                for name in names:
                    meanings.setdefault(name, "")
                    meanings[name] = meanings[name] or entry["text"]
            elif names and line.startswith("        "):
                for name in names:
                    meanings[name] += f" {line.strip()}"
    return meanings


def kind_of_annotation(wanted: Any) -> str:
    """Returns an annotation in words: type and range, or the choices."""
    origin = get_origin(wanted)
    if origin is Annotated:
        inner, *notes = get_args(wanted)
        return _bounded(kind_of_annotation(inner), notes)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind_of_annotation(part) for part in get_args(wanted)))
    if origin is Literal:
        return ", ".join(quoted_value(choice) for choice in get_args(wanted))
    if wanted in TYPES:
        return TYPES[wanted]
    if origin in (list, tuple) or (isinstance(origin, type) and issubclass(origin, (list, tuple))):
        inner = [part for part in get_args(wanted) if part is not Ellipsis]
        return f"list of: {kind_of_annotation(inner[0])}" if inner else "list"
    if isinstance(wanted, type) and issubclass(wanted, BaseModel):
        return "group of settings"
    return ""


def _bounded(kind: str, notes: Sequence[Any]) -> str:
    """Returns a type with its bounds; of several on one side the last, which is the narrower."""
    by_side: dict[str, str] = {}
    for note in notes:
        for bound in _bounds(note):
            by_side[bound.rpartition(" ")[0]] = bound
    return ", ".join([kind, *sorted(by_side.values(), key=lambda bound: bound.startswith("at m"))])


def _bounds(note: Any) -> list[str]:
    if isinstance(note, FieldInfo):
        return [bound for inner in note.metadata for bound in _bounds(inner)]
    found = []
    for name, word in BOUNDS.items():
        bound = getattr(note, name, None)
        if bound is not None:
            found.append(f"{word} {_number(bound)}")
    if isinstance(note, Range):
        sides = (("at least", note.low), ("more than", note.above), ("at most", note.high))
        found += [f"{word} {_number(bound)}" for word, bound in sides if bound is not None]
    return found


def _number(value: Any) -> str:
    """Returns a bound as people write it: 2^24 for the larger powers of two."""
    if isinstance(value, int) and value > 4096 and value.bit_count() == 1:
        return f"2^{value.bit_length() - 1}"
    if isinstance(value, int) and value > 4096 and (value + 1).bit_count() == 1:
        return f"2^{value.bit_length()} - 1"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _field(key: str) -> FieldInfo | None:
    """Returns the field of the schema that a dotted key is; None where it belongs to a class."""
    part: Any = Config
    field = None
    for name in key.split("."):
        if not (isinstance(part, type) and issubclass(part, BaseModel)):
            return None
        fields = {info.alias or own: info for own, info in part.model_fields.items()}
        field = fields.get(name)
        if field is None:
            return None
        kinds = [field.annotation, *get_args(field.annotation)]
        part = next(
            (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None
        )
    return field


def describe(key: str, value: Any, files: list[Path], node: Mapping[str, Any] | None) -> KeyHelp:
    """Returns what is known of a key.

    Args:
        key: dotted, as mixer.window.
        value: its value where nothing is said.
        files: yaml files that may have a comment about it; the first that has one counts.
        node: the node of which it is a setting, with its class; None elsewhere.
    """
    group, _, inner = key.partition(".")
    meaning = ""
    for path in files:
        own = path.parent.name == group
        meaning = meaning or yaml_comments(path).get(inner if own else key, "")
    field = _field(key)
    kind = ""
    if field is not None:
        meaning = meaning or field.description or ""
        wanted = (
            Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        )
        kind = kind_of_annotation(wanted)
    elif node is not None:
        leaf = key.rpartition(".")[2]
        try:
            built = find_class(node[TARGET], group)
        except UserError:
            return KeyHelp(key, quoted_value(value), "", meaning)
        meaning = meaning or documented_arguments(built).get(leaf, "")
        if leaf in parameters(built):
            kind = kind_of_annotation(annotations(built).get(leaf, Any))
    return KeyHelp(key, quoted_value(value), kind, " ".join(meaning.split()))


def files_of(path: Path) -> list[Path]:
    """Returns the yaml files that have comments about the keys of a file, the nearest first."""
    files = [groups.CONF / "train.yaml", groups.CONF / "model" / "decoder.yaml"]
    for group in groups.BY_NAME:
        files += groups.files(group)
    # The comments of an experiment say why it sets a key, not what the key is.
    return [*files, path] if _sets_the_whole(path) else [*inherited(path), *files]


def _sets_the_whole(path: Path) -> bool:
    """Tells whether a file is an experiment, or a part of one in a folder below."""
    return groups.RECIPES in (path.parent.name, path.parent.parent.name)


def keys_of_file(path: Path) -> list[KeyHelp]:
    """Returns every key that a yaml file of conf/ sets, with what is known of it.

    conf/train.yaml and an experiment set keys of the whole config; a member of a group those of its
    part, with those that it takes from the members named in its defaults.
    """
    at_top = path.parent == groups.CONF or _sets_the_whole(path)
    tree: dict[str, Any] = {}
    for file in [path] if at_top else reversed(inherited(path)):
        tree |= yaml_file(file)
    return list(_keys(tree, "" if at_top else f"{path.parent.name}.", files_of(path), None))


def _keys(
    tree: Mapping[str, Any], prefix: str, files: list[Path], node: Mapping[str, Any] | None
) -> Iterator[KeyHelp]:
    node = tree if TARGET in tree else node
    for name, value in tree.items():
        if name in (TARGET, "defaults", "hydra") or (not prefix and name in groups.groups()):
            if isinstance(value, Mapping) and name in groups.groups():
                yield from _keys(value, f"{name}.", files, None)
            continue
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{prefix}{name}.", files, node)
        else:
            yield describe(f"{prefix}{name}", value, files, node)
