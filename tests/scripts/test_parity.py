"""The parity table: of all mixers its tests are found, and a part that is named is compared."""

import sys

from scripts.parity import TESTS
from tests.support import forked_python

# Fewer ways than the command takes; a process that forks ranks must not have computed gradients.
FEW = """
import sys
from trainer.verify import doctor, part_parity
part_parity.METHODS, part_parity.LAYOUTS, part_parity.RANKS = {ways}
doctor.BOUND = {bound}
from scripts import parity
from trainer.entry import run_command
sys.argv = ["parity", *{words}]
run_command(parity.main)
"""
# Two heads cannot be dealt to three ranks.
OWN = ["mixer._target_=examples.own_mixer.Cosine", "model.layers=1", "model.heads=2"]
TWO = ("ring", "ulysses"), ("zigzag",), (3,)


def compared(words, ways=TWO, bound=1e-11):
    program = FEW.format(words=words, ways=ways, bound=bound)
    return forked_python.run([sys.executable, "-c", program])


def test_the_tests_of_the_table_exist():
    assert "def test_" in TESTS.read_text()


def test_a_part_of_ones_own_is_compared_and_ways_that_are_refused_are_told():
    done = compared(OWN)
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("| zigzag | 3 |")]
    ring, ulysses = [cell.strip() for cell in row.split("|")][3:5]
    assert 0 < float(ring) < 1e-11
    assert ulysses == "-"
    assert "-: parallel.method=ulysses: " in done.stdout
    assert "1 cases, 0 failed" in done.stdout


def test_a_figure_above_its_bound_is_a_fault():
    done = compared(OWN, ways=(("ring",), ("contiguous",), (2,)), bound=1e-300)
    assert done.returncode == 1
    assert " FAULT |" in done.stdout
    assert "1 cases, 1 failed" in done.stdout


def test_settings_at_fault_end_with_their_message():
    for words, message in (
        (["mixer._target_=nosuch.Layer"], "there is no module nosuch; looked for in"),
        (["mixer=full", "parallel.context=2"], "parallel.context=2: every way is tried; leave it"),
    ):
        done = compared(words)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
