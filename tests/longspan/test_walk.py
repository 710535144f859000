"""What docs/how-to/own_parts.md promises from an empty folder: every file and command of it."""

import json
import sys
from pathlib import Path

import pytest

from tests.support import forked_python
from tests.support.walked_page import walk

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "own_parts.md"
STARTS = {
    "longspan": [sys.executable, "-m", "longspan"],
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
}


@pytest.mark.slow
def test_every_command_of_the_page_does_what_it_says(tmp_path, monkeypatch):
    # The cache of data, W&B and matplotlib look for a home.
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "folder"
    folder.mkdir()

    def run(words):
        done = forked_python.run([*STARTS[words[0]], *words[1:]], cwd=folder)
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout

    checked, trained, shared, swept, reported, written, asked = walk(
        PAGE, "From an empty folder", folder, run
    )
    assert "nothing was started" in checked
    assert "finished after" in trained
    assert "parallel.context=2" in shared or "finished after" in shared
    losses = []
    for name in ("mine", "shared"):
        lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        kept = (folder / "runs" / name / "source/1/parts.py").read_text()
        assert kept == (folder / "parts.py").read_text()
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert "right/share" in (folder / "runs/mine/evaluation.jsonl").read_text()
    assert "temperature=0.5" in swept
    assert "temperature=2" in swept
    page = (folder / "sweeps/mine/report/index.html").read_text()
    assert "mixer.temperature=0.5" in page
    assert "temperature" in reported
    assert len(written.strip()) > 0
    assert len(asked.strip()) > 0
