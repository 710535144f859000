"""Stop signals, agreed on by all ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from parallel.mesh import Mesh
from trainer.agreement import differing_batch
from trainer.launch.elastic import asked_by
from trainer.launch.exit_report import handling


class StopSignal:
    """Tells whether a signal asked the run to save and stop.

    All ranks ask together, so that they stop after the same step.
    """

    def __init__(self, mesh: Mesh, signals: Any):
        self.mesh = mesh
        self.signals = tuple(signals)
        self.caught = 0

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Takes note of signals for as long as the context lasts, instead of dying of them."""
        with handling(self.signals, self._note):
            yield self

    def _note(self, number: int, frame: Any) -> None:
        # A second signal does not change the reason that the first one gave.
        self.caught = self.caught or asked_by(number)

    def asked(self, mine: int = 0, what: str = "the batch") -> bool:
        """Returns True on every rank when any of them caught a signal. Collective.

        Args:
            mine: the mark of what this rank is about to compute from (trainer/agreement.py); 0 =
                nothing to compare.
            what: what a message calls that.

        Raises:
            UserError: the ranks' marks are not all the same; on every rank.
        """
        word = torch.tensor(
            [self.caught, mine, -mine], dtype=torch.float64, device=self.mesh.device
        )
        if self.mesh.world.group is not None:
            dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self.mesh.world.group)
        caught, largest, smallest = word.tolist()
        if largest != -smallest:
            raise differing_batch(self.mesh, mine, what)
        self.caught = int(caught)
        return self.caught > 0
