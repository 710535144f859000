"""The command that prints the parity table finds the tests that it runs."""

from scripts.parity import TESTS


def test_the_tests_of_the_table_exist():
    assert "def test_" in TESTS.read_text()
