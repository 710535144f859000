"""The tests of the scan kernels on a GPU, against our own scan in float64."""

from collections.abc import Iterator
from typing import Any

from scripts.gpu_checks.reported_tests import run_tests

FILE = "tests/models/kernels/test_scan_fla.py"
WORKERS = 5


def prepare(dry: bool) -> list[str]:
    """Returns the words that choose the tests."""
    return [FILE, "-k", "who_serves_what"] if dry else [FILE, "-k", "on_a_gpu"]


def check(prepared: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Yields a row for each test, and one of all; see `run_tests`."""
    yield from run_tests(prepared, 0 if "who_serves_what" in prepared else WORKERS, seconds)
