"""Every command answers --help with what it does, and exit status 0."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted(
    path.stem for path in (Path(__file__).resolve().parents[2] / "scripts").glob("[a-z]*.py")
)


@pytest.mark.every_case
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_a_script_says_what_it_does(name: str, word: str, monkeypatch, capfd) -> None:
    monkeypatch.setattr(sys, "argv", [name, word])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back, for a command replaces both
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    sys.modules.pop(f"scripts.{name}", None)
    with pytest.raises(SystemExit) as left:
        runpy.run_module(f"scripts.{name}", run_name="__main__")
    sys.stdout.flush()
    assert left.value.code == 0
    assert capfd.readouterr().out.startswith(f"python -m scripts.{name}")
