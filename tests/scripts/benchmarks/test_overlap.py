"""The bench of overlap: a slow link takes its time by bytes, and the figures say what it added."""

import time

import pytest
import torch

from scripts.benchmarks.overlap import measure, parse, table
from scripts.benchmarks.slow_link import SlowCommunicator
from tests.support.pool import ranks


def _moves(env):
    """(seconds of a shift that is waited for later, of an exchange, what came)."""
    communicator = SlowCommunicator(env.group)
    communicator.seconds_per_byte = 0.15 / 400
    began = time.perf_counter()
    pending = communicator.ring_shift([torch.full((100,), float(env.rank))])
    started = time.perf_counter() - began
    (arrived,) = pending.wait()
    shifted = time.perf_counter() - began
    parts = [torch.ones(50)] * env.size
    communicator.all_to_all(parts, [50] * env.size)
    exchanged = time.perf_counter() - began - shifted
    return started, shifted, exchanged, float(arrived[0]), communicator.sending_s


def test_a_send_takes_time_by_its_bytes_and_only_who_waits_for_it():
    for rank, (started, shifted, exchanged, came, sending) in enumerate(ranks(2, _moves)):
        assert started < 0.1
        assert shifted >= 0.15
        assert exchanged >= 0.07
        assert came == 1 - rank
        assert sending == pytest.approx(0.225)


def _rows(env, sizes):
    return list(measure(sizes, env.group))


def test_every_driver_has_its_exposed_share():
    found = ranks(2, _rows, parse(["tokens=64", "heads=2", "width=8", "repeats=1"]))[0]
    assert [row["name"] for row in found] == ["ring", "allgather", "scan"]
    for row in found:
        assert row["bytes"] > 0
        longer = max(row["compute_s"], row["send_s"])
        assert row["beside_longer"] == row["seconds"] / longer
    assert "exposed" in table(found)


def test_one_rank_sends_nothing():
    with pytest.raises(ValueError, match="use ranks=2"):
        parse(["ranks=1"])
