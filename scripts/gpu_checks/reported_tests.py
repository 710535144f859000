"""Runs tests of pytest and yields a row for each that fails as it fails, and one of all."""

import importlib.util
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

OPTIONS = (
    "-q",
    "-p",
    "no:cacheprovider",
    "-o",
    "addopts=--strict-markers --import-mode=importlib",
    "--tb=short",
)


class _Reporter:
    """A plugin that hands on what every test came to."""

    def __init__(self) -> None:
        self.found: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.collected = 0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        self.collected = len(items)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._hand_on(report, "failed")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed or report.when == "call" or report.skipped:
            self._hand_on(report, report.outcome)

    def _hand_on(self, report: Any, outcome: str) -> None:
        row = {"test": report.nodeid.rpartition("::")[2] or report.nodeid, "outcome of it": outcome}
        row["took"] = round(getattr(report, "duration", 0.0), 2)
        if outcome == "failed":
            row |= {"error": report.longreprtext[-1200:], "passed": False}
        else:
            row["detail"] = True
        self.found.put(row)


def run_tests(words: list[str], workers: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Yields a row for each test, and one of all of them.

    Args:
        words: files, and options that choose among them.
        workers: processes; 0 = this one.
        seconds: after which nothing is waited for.
    """
    reporter = _Reporter()
    alone = workers == 0 or importlib.util.find_spec("xdist") is None
    # Workers, because the processor compiles kernels, which takes longer than the tests themselves.
    spread = ["-p", "no:xdist"] if alone else ["-n", str(workers)]

    def work() -> None:
        try:
            pytest.main([*OPTIONS, *spread, *words], plugins=[reporter])
        finally:
            reporter.found.put(None)

    threading.Thread(target=work, daemon=True).start()
    outcomes: Counter[str] = Counter()
    deadline = time.monotonic() + seconds
    whole = False
    while (left := deadline - time.monotonic()) > 0:
        try:
            row = reporter.found.get(timeout=left)
        except queue.Empty:
            break
        if row is None:
            whole = True
            break
        outcomes[row["outcome of it"]] += 1
        yield row
    fine = whole and not outcomes["failed"] and outcomes["passed"] > 0
    counts = {f"tests {outcome}": count for outcome, count in sorted(outcomes.items())}
    yield {"of": " ".join(words), "finished": whole, **counts, "passed": fine}
