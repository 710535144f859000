"""Every command of scripts/ says what it is for, and refuses a stranger's package in front."""

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import entry

SCRIPTS = Path(__file__).parents[2] / "scripts"
COMMANDS = [
    *(path.stem for path in SCRIPTS.glob("*.py") if path.stem != "__init__"),
    *(path.parent.name for path in SCRIPTS.glob("*/__main__.py")),
]


@pytest.mark.parametrize("word", ["--help", "-h"])
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_is_printed_and_nothing_is_done(name, word, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, word])
    # It would write to the terminal itself, past what pytest reads.
    monkeypatch.setattr(entry, "protect", lambda: None)
    place = f"scripts.{name}"
    if (SCRIPTS / name).is_dir():
        place += ".__main__"
    importlib.import_module(place)  # so that it is run again, with all that it imports in memory
    monkeypatch.delitem(sys.modules, place)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(place, run_name="__main__")
    assert not end.value.code
    printed = capsys.readouterr()
    assert f"python -m scripts.{name}" in printed.out
    assert printed.err == ""
    assert list(tmp_path.iterdir()) == []


def test_a_strangers_package_in_front_is_one_message(tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-m", "scripts.report", "runs/mine"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"trainer: {tmp_path}")
