"""The bench measures what it says: the same work on one device and on many, with the bytes of the
formula."""

import subprocess
import sys

import pytest
import torch

from scripts.benchmarks.attention import AttentionSizes, documents, measure, parse
from tests.support.pool import ranks
from tests.test_architecture import ROOT


def rows(env, sizes):
    return list(measure(sizes, env.group))


@pytest.mark.full
def test_every_way_is_measured_and_sends_what_it_should():
    sizes = AttentionSizes(tokens=128, heads=4, kv_heads=2, width=8, ranks=4, repeats=1)
    for found in ranks(4, rows, sizes):
        names = [(row["section"].split()[-1], row["name"]) for row in found]
        assert {name for section, name in names if section == "document"} == {
            "one device, SDPA",
            "one device, ours",
            "ring",
            "ulysses",
            "allgather",
            "usp",
            "ring_attention_pytorch",
        }
        shared = [row for row in found if "sent_bytes" in row]
        assert len(shared) >= 12
        assert all(
            row["sent_bytes"] == row["formula_bytes"] and max(row["sent_bytes"]) > 0
            for row in shared
        )
        assert all(row["seconds"] > 0 and row["processor_seconds"] > 0 for row in found)
        assert [row["tokens"] for row in found[-5:]] == [128] * 3 + [512] * 2
        work = {
            (row["section"], row["name"], row.get("layout")): row.get("balance") for row in found
        }
        assert (
            work["one causal document", "ring", "zigzag"]
            < 1.02
            < 1.5
            < work["one causal document", "ring", "contiguous"]
        )


def test_documents_fill_the_row():
    span = documents(5000, 0)
    assert span.shape == (1, 5000) and span.valid().all()
    assert int(span.doc.max()) > 2
    assert torch.equal(span.pos == 0, torch.cat([span.doc.new_ones(1, 1), span.doc.diff()], 1) == 1)


PEAK = """
import torch
from scripts.benchmarks.timing import peak_bytes

def step():
    held = torch.ones({size} // 4)
    del held
    torch.ones({size} // 8)

print(peak_bytes(step))
"""


@pytest.mark.full
def test_the_peak_is_what_a_step_holds_at_once():
    size = (
        64 << 20
    )  # in a process of its own: elsewhere the allocator may still hold what other tests left
    told = subprocess.run(
        [sys.executable, "-c", PEAK.format(size=size)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    found = told.stdout.split()[-1]
    assert found == "None" or 0.95 * size <= int(found) < 1.4 * size, "pages, not bytes"


@pytest.mark.parametrize(
    "word, words",
    [
        ("token=8", "no setting 'token'; there are tokens, heads"),
        ("tokens=many", "whole number of at least 1"),
        ("tokens=0", "whole number of at least 1"),
        ("kv_heads=3", "kv_heads=3 does not divide heads=8"),
        ("ranks=1", "ranks=1 shares nothing"),
    ],
)
def test_a_wish_that_cannot_be_measured_is_refused(word, words):
    with pytest.raises(ValueError, match=words):
        parse([word])


def test_words_become_sizes():
    assert parse(["tokens=64", "seed=0"]) == AttentionSizes(tokens=64)
