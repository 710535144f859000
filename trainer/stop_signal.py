"""Agreement of all ranks before a step: on stop signals, and on what they compute from."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh
from trainer.agreement import Marks, differing_batch
from trainer.launch.elastic import asked_by
from trainer.launch.exit_report import handling

NO_MARKS = Marks()


class StopSignal:
    """Tells whether a signal asked the run to save and stop.

    All ranks ask together, so that they stop after the same step.

    Attributes:
        noted: what this rank has caught; it may come in at any moment, and is told at the next
            meeting.
        caught: what all ranks know of, the same on each; once it is set it stays.
    """

    def __init__(self, mesh: Mesh, signals: Any):
        self.mesh = mesh
        self.signals = tuple(signals)
        self.noted = 0
        self.caught = 0

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Takes note of signals for as long as the context lasts, instead of dying of them."""
        with handling(self.signals, self._note):
            yield self

    def _note(self, number: int, frame: Any) -> None:
        # A second signal does not change the reason that the first one gave.
        self.noted = self.noted or asked_by(number)

    def asked(self, mine: int = 0, what: str = "the batch") -> bool:
        """Returns True on every rank when any of them caught a signal. Collective.

        Args:
            mine: the mark of what every rank is about to compute from; 0 = nothing to compare.
            what: as in `meet`.
        """
        return self.meet(Marks(step=mine), what=what) is None

    def meet(
        self, mine: Marks = NO_MARKS, figures: Sequence[float] = (), what: str = "the batch"
    ) -> list[float] | None:
        """As `begin`, and waits for the answer."""
        return self.begin(mine, figures, what).answer()

    def begin(
        self, mine: Marks = NO_MARKS, figures: Sequence[float] = (), what: str = "the batch"
    ) -> "Meeting":
        """Adds up figures of all rows; one all-reduce for these, the marks and the signal.

        It goes from host to host, so that its answer waits for no work of a device. All ranks must
        begin the same meetings in the same order.

        Args:
            mine: marks of what this rank is about to compute from.
            figures: of the rows of this data rank, the same on all ranks that share them.
            what: what a message calls that.
        """
        slots = self.mesh.data.size
        own = [mine.rows, -mine.rows, *figures]
        # A maximum with a slot for each data rank: it tells of ranks that share rows and differ,
        # and sums are then exact and the same everywhere.
        word = torch.full((3 + slots * len(own),), -math.inf, dtype=torch.float64)
        word[:3] = word.new_tensor([self.noted, mine.step, -mine.step])
        word[3:].view(slots, -1)[self.mesh.data.rank] = word.new_tensor(own)
        work = None
        if self.mesh.world.group is not None:
            work = dist.all_reduce(
                word, op=dist.ReduceOp.MAX, group=self.mesh.world.group, async_op=True
            )
        return Meeting(self, word, work, mine, what)


class Meeting:
    """An exchange between all ranks that was begun; see StopSignal.begin."""

    def __init__(self, stop: StopSignal, word: Tensor, work: Any, mine: Marks, what: str):
        self.stop = stop
        self.word = word
        self.work = work
        self.mine = mine
        self.what = what

    def answer(self) -> list[float] | None:
        """Waits for the other ranks.

        Returns:
            The sums over data ranks, on every rank; None on every rank when any caught a signal,
            at this meeting or before.

        Raises:
            UserError: the ranks' marks are not all the same; on every rank.
        """
        if self.work is not None:
            self.work.wait()
        mesh = self.stop.mesh
        caught, *common = self.word[:3].tolist()
        largest, smallest, *each = self.word[3:].view(mesh.data.size, -1).unbind(1)
        if common[0] != -common[1] or not torch.equal(largest, -smallest):
            raise differing_batch(mesh, self.mine, self.what)
        self.stop.caught = self.stop.caught or int(caught)
        return None if self.stop.caught else [math.fsum(values.tolist()) for values in each]
