"""The layout of the code, held as a test: who may import whom, how long a file may be, no circles, no ranks in models."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "models": {"models"},
    "parallel": {"parallel", "models"},
    "trainer": {"trainer", "parallel", "models"},
    "scripts": {"scripts", "trainer", "parallel", "models"},
}
FILES = sorted(p for f in MAY_IMPORT for p in (ROOT / f).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FORBIDDEN_ROOMS = {"utils", "common", "core", "helpers", "misc"}


def name_of(path):
    return str(path.relative_to(ROOT))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path):
    home = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in MAY_IMPORT or top in MAY_IMPORT[home], f"{home}/ may not import {name}"
        assert top not in ("tests", "conf"), f"{home}/ may not import {name}"
        if home == "models":
            assert not name.startswith("torch.distributed"), "models/ knows no ranks"
            assert top not in ("hydra", "omegaconf", "wandb", "deepspeed", "datasets"), f"models/ may not import {name}"
        assert home != "parallel" or top not in ("hydra", "omegaconf", "wandb", "datasets"), f"parallel/ may not import {name}"


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=name_of)
def test_a_file_fits_in_the_head(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=name_of)
def test_init_files_are_empty(path):
    assert not path.read_text()


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "scripts"], ids=name_of)
def test_commands_are_thin(path):
    assert len(path.read_text().splitlines()) <= 80


def test_no_room_without_a_purpose():
    assert not {p.stem for p in FILES} & FORBIDDEN_ROOMS
    assert not {p.parent.name for p in FILES} & FORBIDDEN_ROOMS


def test_no_circles():
    module = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES}
    edges = {m: {i for i in imports(p) if i in module and i != m} for m, p in module.items()}
    while leaves := {m for m, to in edges.items() if not to}:
        edges = {m: to - leaves for m, to in edges.items() if m not in leaves}
    assert not edges, f"circle among {sorted(edges)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_stand_at_the_top(path):
    tree = ast.parse(path.read_text())
    inside = [
        node.lineno
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not inside or path.relative_to(ROOT) == Path("models/kernels/backends.py"), f"import inside a function: {inside}"
