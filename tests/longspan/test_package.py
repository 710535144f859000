"""The package `longspan`: its names, a stranger's packages in front of ours, and the wheel."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import longspan
from longspan import own_packages

ROOT = Path(__file__).parents[2]


def test_the_names_for_type_checkers_are_those_at_run_time():
    tree = ast.parse((ROOT / "longspan/__init__.py").read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    places = {}
    for statement in typed.body:
        assert isinstance(statement, ast.ImportFrom)
        for alias in statement.names:
            places[alias.asname or alias.name] = f"{statement.module}.{alias.name}"
    assert places == longspan._PLACES
    assert sorted(places) == sorted(longspan.__all__)
    for name, place in places.items():
        module, _, attribute = place.rpartition(".")
        assert getattr(longspan, name) is getattr(importlib.import_module(module), attribute)


def test_an_unknown_name_is_said():
    with pytest.raises(AttributeError, match=r"module longspan has no lod; it has .*load"):
        longspan.lod  # noqa: B018


@pytest.mark.parametrize("name", own_packages.OWN)
def test_a_strangers_package_is_refused(name, tmp_path, monkeypatch):
    assert own_packages.stranger() is None
    (tmp_path / name).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name)
    assert own_packages.stranger() is None, "a folder without an __init__.py is no package"
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')")
    importlib.invalidate_caches()
    message = own_packages.stranger()
    assert message is not None
    assert message.startswith(f"{name}: {tmp_path / name / '__init__.py'} is found in the place of")
    assert "give that folder another name" in message
    with pytest.raises(ImportError, match="is found in the place of"):
        own_packages.demand_own_packages()


def test_a_command_beside_a_strangers_package_ends_with_one_message(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "experiment=quickstart"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"models: {tmp_path}")
