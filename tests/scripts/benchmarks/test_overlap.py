"""The bench of overlap: a slow link takes its time by bytes, and the figures say what it added."""

from unittest import mock
from unittest.mock import Mock

import pytest
import torch

from scripts.benchmarks import slow_link
from scripts.benchmarks.overlap import measure, parse, table
from scripts.benchmarks.slow_link import SlowCommunicator
from tests.support.pool import ranks


def _moves(env):
    """When a shift was started, when it had come, when an exchange had, ..., by a clock that only
    sleeping moves. Rank 1 begins five seconds after rank 0.
    """
    now = 5.0 * env.rank

    def sleep(seconds):
        nonlocal now
        now += seconds

    communicator = SlowCommunicator(env.group)
    communicator.seconds_per_byte = 0.15 / 400
    with mock.patch.object(slow_link, "time", Mock(perf_counter=lambda: now, sleep=sleep)):
        pending = communicator.ring_shift([torch.full((100,), float(env.rank))])
        started = now
        (came,) = pending.wait()
        shifted = now
        communicator.all_to_all([torch.ones(50)] * env.size, [50] * env.size)
    return started, shifted, now, float(came[0]), communicator.sending_s


def test_a_send_takes_time_by_its_bytes_and_only_who_waits_for_it():
    first, second = ranks(2, _moves)
    # Rank 0 waits for the link of rank 1; what rank 0 sent came long before rank 1 asked.
    assert first == pytest.approx((0, 5.15, 5.225, 1, 0.225))
    # The exchange goes behind the shift on the link of rank 1.
    assert second == pytest.approx((5, 5, 5.225, 0, 0.225))


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
