"""Architecture rules: direction of imports, file length, circles, and no ranks in models.

Each test lists every offender.
"""

import ast
import re
import sys
import tomllib
from collections import Counter
from functools import cache
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "models": {"models"},
    "parallel": {"parallel", "models"},
    "trainer": {"trainer", "parallel", "models"},
    "scripts": {"scripts", "trainer", "parallel", "models"},
    "longspan": {"longspan", "trainer", "parallel", "models"},
}
AT_START = "longspan.at_start"  # what a command imports before everything else
LIBRARY = Path("longspan/__init__.py")  # which names what a user imports
COMMANDS = Path("scripts/__init__.py")  # which looks for a stranger's packages before any command
OF_A_CHECKOUT = Path("scripts/gpu_checks")  # runs tests and uses their helpers: no user imports it
NOT_IN_MODELS = {"hydra", "omegaconf", "wandb", "deepspeed", "datasets"}
NOT_IN_PARALLEL = {"hydra", "omegaconf", "wandb", "datasets"}
FILES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# Packages whose module has another name than their distribution.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "hydra": "hydra_core",
    "pydantic_core": "pydantic",
    "yaml": "pyyaml",
}
FORBIDDEN_ROOMS = {"utils", "common", "core", "helpers", "misc"}
LAZY_IMPORTS = {Path("models/kernels/backends.py")}  # an optional kernel is imported when chosen


@cache
def nodes(path):
    """Every node of a file's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text())))


def imported_names(path):
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden_import(path, name):
    home = path.parts[0]
    top = name.split(".")[0]
    if top == "tests" and path.parent == OF_A_CHECKOUT:
        return False
    if name == AT_START:
        return home not in ("trainer", "longspan", "scripts")
    if top in ("tests", "conf") or (top in MAY_IMPORT and top not in MAY_IMPORT[home]):
        return True
    if home == "models":
        return name.startswith("torch.distributed") or top in NOT_IN_MODELS
    return home == "parallel" and top in NOT_IN_PARALLEL


def test_imports_point_one_way():
    offenders = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        for name in imported_names(path)
        if forbidden_import(path.relative_to(ROOT), name)
    ]
    assert not offenders, "\n".join(offenders)


def test_packages_that_are_imported_are_named_in_pyproject():
    """A package that only comes with another one is missing on the day when that one drops it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = chain.from_iterable(project["optional-dependencies"].values())
    words = (re.split(r"[<>=\[]", word)[0] for word in chain(project["dependencies"], extras))
    named = {word.lower().replace("-", "_") for word in words}
    ours = {*MAY_IMPORT, "tests", *sys.stdlib_module_names}
    offenders = set()
    for path in FILES:
        for name in imported_names(path):
            top = name.split(".")[0]
            if top not in ours and DISTRIBUTIONS.get(top, top) not in named:
                offenders.add(f"{path.relative_to(ROOT)} imports {top}")
    assert not offenders, "\n".join(sorted(offenders))


def test_docstrings_begin_with_a_thing_or_a_verb():
    """ "What holds ..." is a clause: a reader looks for the noun or the verb that it hides."""
    clause = re.compile(r"(What|Which|Who|Whose|How|Where|Whether|When)\b")
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    offenders = []
    for path in FILES:
        for node in nodes(path):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and clause.match(text):
                offenders.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert not offenders, "\n".join(offenders)


def test_files_have_at_most_400_lines():
    lengths = {path: len(path.read_text().splitlines()) for path in [*FILES, *TESTS]}
    offenders = [
        f"{path.relative_to(ROOT)}: {length}" for path, length in lengths.items() if length > 400
    ]
    assert not offenders, "\n".join(offenders)


def test_functions_have_at_most_60_lines():
    offenders = []
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > 60:
                    offenders.append(f"{path.relative_to(ROOT)}: {node.name} {length}")
    assert not offenders, "\n".join(offenders)


def test_folders_have_at_most_21_files():
    counts = Counter(path.parent for path in FILES if path.name != "__init__.py")
    crowded = {folder: count for folder, count in counts.items() if count > 21}
    assert not crowded


def test_commands_are_thin_and_init_files_are_empty():
    offenders = [str(path) for path in FILES if path.name == "__init__.py" and path.read_text()]
    offenders.remove(str(ROOT / LIBRARY))
    offenders.remove(str(ROOT / COMMANDS))
    commands = [path for path in FILES if path.parent == ROOT / "scripts"]
    offenders += [str(path) for path in commands if len(path.read_text().splitlines()) > 100]
    assert not offenders, "\n".join(offenders)


def test_no_room_without_a_purpose():
    names = {path.stem for path in FILES} | {path.parent.name for path in FILES}
    assert not names & FORBIDDEN_ROOMS


def test_no_circles():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    edges = {
        module: {name for name in imported_names(path) if name in modules and name != module}
        for module, path in modules.items()
    }
    while leaves := {module for module, targets in edges.items() if not targets}:
        edges = {
            module: targets - leaves for module, targets in edges.items() if module not in leaves
        }
    assert not edges, f"circle among {sorted(edges)}"


def test_imports_stand_at_the_top():
    offenders = []
    for path in FILES:
        if path.relative_to(ROOT) in LAZY_IMPORTS:
            continue
        for function in nodes(path):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    offenders.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not offenders, "\n".join(offenders)


def test_no_test_is_left_out_because_a_package_is_missing():
    # What tests import is declared in pyproject.toml; a missing one is an error, not a skip.
    asks = "import" + "orskip"
    tests = Path(__file__).parent
    assert [path for path in tests.rglob("*.py") if asks in path.read_text("utf-8")] == []
