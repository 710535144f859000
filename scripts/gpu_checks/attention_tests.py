"""The tests of the attention kernels on a GPU, our own in Triton and the versions of flash-attn
that are installed among them: forward, backward and an lse from outside, each against the
reference kernel in float64."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.gpu_checks.reported_tests import run_tests

FOLDER = Path("tests/models/kernels")
TRITON = str(FOLDER / "triton_attention" / "interpreted_attention.py")
WORKERS = 2


def prepare(dry: bool) -> list[str]:
    """Returns the words that choose the tests."""
    files = sorted(map(str, FOLDER.rglob("test_*cuda*.py")))
    if dry:
        return [*files, "-k", "table_knows or empty_side"]
    others = [str(FOLDER / name) for name in ("test_grouped_mm.py",) if (FOLDER / name).exists()]
    return [*files, TRITON, *others]


def check(prepared: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Yields a row for each test, and one of all; see `run_tests`."""
    yield from run_tests(prepared, 0 if "-k" in prepared else WORKERS, seconds)
