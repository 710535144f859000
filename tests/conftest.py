"""Every test draws the same numbers every time; files with slow tests come first, so that no core
idles while the last ends."""

import gc
import importlib
import os
import shutil
import sys
import tempfile

import pytest
import torch

from tests.support.case_cover import mark_what_is_covered

COMPOSED = "LONGSPAN_TESTS_COMPOSED"


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_what_is_covered(items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # files stay whole, and in their order


def pytest_configure(config: pytest.Config) -> None:
    """The first process makes the folder of tests/support/composed_once.py for all."""
    if COMPOSED not in os.environ:
        os.environ[COMPOSED] = folder = tempfile.mkdtemp(prefix="longspan-composed-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_finish() -> None:
    """Spares collections the two million objects of the libraries: some tests make many."""
    if "trainer.config.compose" in sys.modules:
        importlib.import_module("tests.support.composed_once").share_composed()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
