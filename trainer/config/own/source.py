"""Keeps the source of a user's own parts beside a run: RUN/source/1/, and /2/ where it changed.

A config names a class, and the file that held it changes. So every start of a run copies the files
that its config leads to, with their hashes, and a run that goes on with other source says so.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.config.values import TARGET
from trainer.files.limited_reader import json_object
from trainer.files.safe_files import replace_inside

FOLDER = "source"
HASHES = "sha256.json"
OURS = ("models", "parallel", "trainer", "longspan", "scripts")
INSTALLED = ("site-packages", "dist-packages")


def own_source(tree: Any) -> dict[str, Path]:
    """Returns the files of a user's own that a config leads to, by their path from their root.

    These are the modules of all classes that the config names, and what they import in turn, except
    Longspan's, Python's and installed packages, whose versions the run records.

    Args:
        tree: a plain config.
    """
    files: dict[str, Path] = {}
    waiting = [str(target).rpartition(".")[0] for target in _targets(tree)]
    while waiting:
        name = waiting.pop()
        path = _own_file(name)
        if path is None:
            continue
        place = "/".join(name.split(".")) + ".py"
        if path.name == "__init__.py":
            place = f"{place.removesuffix('.py')}/__init__.py"
        if place not in files:
            files[place] = path
            # The packages around a module run before it.
            waiting += [name.rpartition(".")[0], *_imports(path, name)]
    return dict(sorted(files.items()))


def save_source(directory: Path, tree: Any) -> str:
    """Copies the own source of a config into a run directory; returns a remark where it changed.

    Raises:
        OSError: the directory cannot be written.
    """
    contents = {place: path.read_bytes() for place, path in own_source(tree).items()}
    if not contents:
        return ""
    hashes = {place: _hash(content) for place, content in contents.items()}
    number, before = newest_source(directory)
    if before == hashes:
        return ""
    here = f"{FOLDER}/{number + 1}"
    for place, content in contents.items():
        replace_inside(directory, f"{here}/{place}", content)
    # Last, so that a copy which a kill cut short is not taken for a whole one.
    replace_inside(directory, f"{here}/{HASHES}", json.dumps(hashes, indent=2) + "\n")
    if before is None:
        return ""
    return (
        f"source: {', '.join(_changed(before, hashes))} changed since this run was last started; it"
        f" goes on with the new source, in {directory / here}; the former is in"
        f" {directory / FOLDER / str(number)}"
    )


def source_hashes(tree: Any) -> dict[str, str]:
    """Returns the hash of every file of a user's own that a config leads to."""
    return {place: _hash(path.read_bytes()) for place, path in own_source(tree).items()}


def newest_source(directory: Path) -> tuple[int, dict[str, str] | None]:
    """Returns the number of the newest whole copy in a run directory and its hashes.

    0 and None where there is none.
    """
    numbers = [int(path.name) for path in (directory / FOLDER).glob("*") if path.name.isdecimal()]
    for number in sorted(numbers, reverse=True):
        try:
            hashes = json_object(directory / FOLDER / str(number) / HASHES, follow=False)
        except (OSError, ValueError):
            continue
        return number, {str(place): str(value) for place, value in hashes.items()}
    return max(numbers, default=0), None


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Returns what differs between two sets of files, with the beginnings of their hashes."""
    said = []
    for place in sorted({*before, *after}):
        old = before.get(place)
        new = after.get(place)
        if old == new:
            continue
        if old is None or new is None:
            said.append(f"{place} ({'new' if old is None else 'gone'})")
        else:
            said.append(f"{place} ({old[:8]} to {new[:8]})")
    return said


def _targets(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        if TARGET in tree:
            yield tree[TARGET]
        for value in tree.values():
            yield from _targets(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _targets(value)


def _own_file(name: str) -> Path | None:
    """Returns the file of a module if it is the user's own; None for any other."""
    if not name or name.partition(".")[0] in OURS:
        return None
    if name.partition(".")[0] in sys.stdlib_module_names:
        return None
    # Whatever the run uses was imported when its config was checked; nothing is imported for this.
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None or not file.endswith(".py") or set(INSTALLED) & set(Path(file).parts):
        return None
    return Path(file)


def _imports(path: Path, name: str) -> Iterable[str]:
    """Yields the names of the modules that a file may import, whether they are modules or not."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if not isinstance(node, ast.ImportFrom):
            continue
        base = node.module or ""
        if node.level:
            parents = package.split(".")
            kept = parents[: len(parents) - node.level + 1]
            base = ".".join([*kept, base]).strip(".")
        yield base
        # `from package import module` names a module where there is no such attribute.
        for alias in node.names:
            if f"{base}.{alias.name}" in sys.modules:
                yield f"{base}.{alias.name}"
