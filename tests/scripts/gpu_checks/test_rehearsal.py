"""The whole check of a GPU, rehearsed with tiny sizes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.gpu_checks.schedule import STEPS

ROOT = Path(__file__).parents[3]


@pytest.mark.full
def test_every_step_passes_in_a_rehearsal(tmp_path):
    settings = {"DRY": "1", "LIMIT": "500", "OUT": str(tmp_path), "PYTHON": sys.executable}
    process = subprocess.run(
        ["bash", "scripts/gpu_check.sh"], cwd=ROOT, env={**os.environ, **settings}, check=False
    )
    lines = (tmp_path / "gpu_check.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    outcomes = {row["step"]: row["outcome"] for row in rows if "outcome" in row}
    assert outcomes == {step.name: "passed" for step in STEPS}
    assert process.returncode == 0
    for step in STEPS:
        assert any(row["step"] == step.name and len(row) > 3 for row in rows), step.name
