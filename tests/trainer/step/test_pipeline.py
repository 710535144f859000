"""Inputs that ranks meet on ahead: never past the last step, and faults wait for their own step."""

from collections import deque

import pytest

from parallel.mesh import Mesh
from trainer.agreement import Marks
from trainer.data.streams.prefetch import StepCounts, StepInput
from trainer.step.pipeline import InputsAhead
from trainer.stop_signal import StopSignal


class Reads:
    """A prefetcher of steps 1, 2, ..., of which one cannot be read."""

    def __init__(self, is_ahead=True, broken=None):
        self.is_ahead = is_ahead
        self.broken = broken
        self.read_steps = []

    def read(self, cursor):
        step = cursor["step"] + 1
        self.read_steps.append(step)
        if step == self.broken:
            raise OSError(f"step {step} cannot be read")
        return StepInput({"step": step}, Marks(), StepCounts(step, 1, 0.0), deque())


def inputs(reads, steps=3):
    return InputsAhead(reads, StopSignal(Mesh.alone(), ()), steps)  # pyright: ignore


def test_a_step_is_read_once_ahead_and_none_behind_the_last():
    reads = Reads()
    ahead = inputs(reads)
    for step in (1, 2, 3):
        met = ahead.meet({"step": step - 1}, step)
        assert met is not None and met.figures.valid_tokens == step
        ahead.look_ahead(met.cursor, step + 1)
        assert reads.read_steps == [1, 2, 3][: step + 1]


def test_without_a_thread_nothing_is_read_ahead():
    reads = Reads(is_ahead=False)
    ahead = inputs(reads)
    ahead.look_ahead({"step": 0}, 1)
    assert reads.read_steps == []
    assert ahead.meet({"step": 0}, 1) is not None


def test_what_cannot_be_read_is_told_where_its_step_begins():
    ahead = inputs(Reads(broken=2))
    met = ahead.meet({"step": 0}, 1)
    assert met is not None
    ahead.look_ahead(met.cursor, 2)
    with pytest.raises(OSError, match="step 2"):
        ahead.meet(met.cursor, 2)
