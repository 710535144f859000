"""Pieces of a row one after another: what one was computed in is given back before the next."""

import re
from pathlib import Path

import pytest
import torch

from models.span import Span
from parallel.heap import trim_heap
from parallel.row_pieces import piece_state
from parallel.rows_in_time import run_in_pieces
from tests.support.pool import ranks

MEBIBYTE = 1 << 20
STATUS = Path("/proc/self/status")


def held() -> int:
    """Returns the resident bytes of this process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


def growths(env) -> list[int]:
    """Bytes held at the beginning of each call of two passes over three pieces, beside the first.

    Every piece computes in 96 MiB and keeps a few bytes between its blocks.
    """
    # After this, blocks of 4 MiB come from the heap and not from the system.
    torch.empty(30 * MEBIBYTE, dtype=torch.uint8)
    kept = []
    seen = []

    def compute() -> torch.Tensor:
        seen.append(held())
        blocks = []
        for _ in range(24):
            blocks.append(torch.ones(4 * MEBIBYTE, dtype=torch.uint8))
            kept.append(torch.ones(4096, dtype=torch.uint8))
        return torch.zeros((), requires_grad=True) * len(blocks)

    spans = [Span.line(1, 4) for _ in range(3)]
    run_in_pieces(
        piece_state(spans),
        lambda number, span: compute(),
        lambda number, span: compute(),
        lambda loss, last: loss.backward(),
    )
    return [count - seen[0] for count in seen[1:]]


@pytest.mark.skipif(not trim_heap(), reason="the C library is not glibc")
def test_what_a_piece_was_computed_in_does_not_stay():
    (found,) = ranks(1, growths)
    assert len(found) == 4  # the last piece does not look ahead
    assert max(found) < 32 * MEBIBYTE
