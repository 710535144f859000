"""A thread in the background rests in proportion to what it used, not for ever, and not while
somebody waits for it."""

import errno
import time

import pytest
import torch

from trainer.checkpoint import throttle, writer
from trainer.checkpoint.storage import ShardWriter
from trainer.checkpoint.throttle import Throttle
from trainer.checkpoint.writer import CheckpointWriter


class Clock:
    """Processor time that goes on by what it is told, and rests that take none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, one: Throttle):
        self.used, self.rests = 0.0, []
        monkeypatch.setattr(throttle.time, "thread_time", lambda: self.used)
        monkeypatch.setattr(one.waited_for, "wait", self.rests.append)

    def work(self, one: Throttle, seconds: float) -> None:
        self.used += seconds
        one.rest()


def test_a_thread_takes_its_share_and_no_more_rest_than_it_may(monkeypatch):
    one = Throttle(share=0.2, most=10)
    clock = Clock(monkeypatch, one)
    clock.used = 100.0  # of work before
    one.begin()
    for seconds in (1.0, 0.5, 2.0, 1.0):
        clock.work(one, seconds)
    assert clock.rests == pytest.approx([4.0, 2.0, 4.0])


def test_a_thread_that_is_waited_for_and_one_with_a_whole_core_never_rest(monkeypatch):
    for one, waits in ((Throttle(share=0.2), True), (Throttle(share=1), False)):
        clock = Clock(monkeypatch, one)
        if waits:
            one.hurry()
        clock.work(one, 1.0)
        assert not clock.rests
    with pytest.raises(ValueError, match="at most 1"):
        Throttle(share=0)


def saving(tmp_path, monkeypatch) -> tuple[CheckpointWriter, dict, list[int]]:
    """Checkpoints whose thread all but stands still, a state, and where each save's copy of it
    lay."""
    monkeypatch.setattr(writer, "Throttle", lambda share=1e-9: Throttle(share))
    places: list[int] = []
    write = ShardWriter._write

    def noting(self, name, items, planner):
        places.append(planner.resolve_data(items[0]).data_ptr())
        return write(self, name, items, planner)

    monkeypatch.setattr(ShardWriter, "_write", noting)
    return (
        CheckpointWriter(tmp_path, asynchronous=True),
        {"model": {"w": torch.arange(1_000_000.0)}},
        places,
    )


def test_a_save_beside_training_takes_its_time_until_somebody_waits_for_it(tmp_path, monkeypatch):
    checkpoints, state, _ = saving(tmp_path, monkeypatch)
    checkpoints.save(1, state, {})
    time.sleep(0.5)
    assert checkpoints.poll() is None and not (tmp_path / "step_00000001").exists()
    began = time.monotonic()
    assert checkpoints.finish() == 1 and time.monotonic() - began < throttle.MOST_S / 2
    loaded = checkpoints.load(tmp_path / "step_00000001", {"model": {"w": torch.zeros(1_000_000)}})
    assert torch.equal(loaded.state["model"]["w"], state["model"]["w"])


def test_the_copy_for_a_save_takes_the_memory_of_the_copy_before(tmp_path, monkeypatch):
    checkpoints, state, places = saving(tmp_path, monkeypatch)
    for step in (1, 2, 3):
        state["model"]["w"].add_(1)
        checkpoints.save(step, state, {})
    checkpoints.close()
    assert len(set(places)) == 1 and places[0] != state["model"]["w"].data_ptr()
    loaded = checkpoints.load(tmp_path / "step_00000003", {"model": {"w": torch.zeros(1_000_000)}})
    assert torch.equal(loaded.state["model"]["w"], state["model"]["w"])


def test_a_run_that_ends_by_a_fault_does_not_lose_the_save_on_its_way(tmp_path, monkeypatch):
    checkpoints, state, _ = saving(tmp_path, monkeypatch)
    checkpoints.settle(1.0)  # nothing to wait for
    checkpoints.save(1, state, {})
    checkpoints.settle(30.0)
    assert (tmp_path / "step_00000001").is_dir()


def test_a_save_that_fails_while_the_run_ends_is_said_and_does_not_hide_the_reason(
    tmp_path, monkeypatch
):
    checkpoints, state, _ = saving(tmp_path, monkeypatch)
    said: list[str] = []
    checkpoints.say = said.append

    def full(self, name, items, planner):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "_write", full)
    checkpoints.save(3, state, {})
    checkpoints.settle(30.0)
    assert len(said) == 1 and "checkpoint of step 3 was not saved either" in said[0]
    assert not (tmp_path / "step_00000003").exists()


def test_a_save_that_does_not_come_to_its_end_is_said(tmp_path, monkeypatch):
    checkpoints, state, _ = saving(tmp_path, monkeypatch)
    said: list[str] = []
    checkpoints.say = said.append
    monkeypatch.setattr(throttle.Throttle, "hurry", lambda self: None)
    checkpoints.save(4, state, {})
    checkpoints.settle(0.2)
    assert said == [
        "the checkpoint of step 4 was not saved either (not whole after 0.2 s); the one before is"
        " the last"
    ]
    monkeypatch.undo()
    assert checkpoints.finish() == 4
