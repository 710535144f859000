"""Skips a step whose loss or gradient is not finite and, if asked, one whose gradient spikes.

A skipped step is left out altogether: nothing is multiplied by 0, because 0 x NaN is NaN.
Parameters, the state of the optimiser and the statistics of layers stay bit for bit the same.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh
from trainer.config.schema import OptimConfig
from trainer.data.batch_sharding import BatchSharder
from trainer.errors import BAD_RUN, UserError
from trainer.progress import WINDOW, Progress

LEAST = 16  # fewer norms have no meaningful median


class SkippedStep(NamedTuple):
    """Reason why a step was not taken, and the place of its batch in the data."""

    why: str
    finite: bool
    cursor: dict[str, Any]
    rows: list[int]
    way: str

    def row(self) -> dict[str, Any]:
        """Returns the entry of metrics.jsonl."""
        return {"why": self.why, "cursor": self.cursor, "rows": self.rows}

    def line(self, step: int) -> str:
        """Returns the line for the console."""
        rows = f" (not finite in rows {', '.join(map(str, self.rows))})" if self.rows else ""
        return f"step {step} skipped: {self.why}; its batch is at {self.cursor}{rows}"


class SkipStepGuard:
    """Decides whether a step is taken.

    The norms that it compares with are part of Progress, so that a resumed run decides as an
    uninterrupted one.

    Args:
        optim: `skip_above`: a gradient norm above this many times the median of the last WINDOW
            finite ones is skipped, once there are LEAST of them; 0 = never. `max_skipped`: number
            of steps skipped in a row that ends the run.

    A norm that was skipped for its size enters the window too: where gradients have grown for good,
    the median follows. One that is not finite never does. Cf. OLMo-core's SkipStepOptimizer, which
    compares with mean and deviation: one NaN among its last norms makes every comparison false.
    """

    def __init__(self, mesh: Mesh, share: BatchSharder, optim: OptimConfig):
        self.mesh = mesh
        self.share = share
        self.optim = optim
        self.flags: list[Tensor] = []

    def look(self, losses: Tensor) -> None:
        """Notes the rows of a micro-batch whose loss is not finite; losses: [rows, tokens]."""
        self.flags.append(~losses.detach().isfinite().all(1))

    def noted(self) -> list[Tensor]:
        """Takes out what `look` noted."""
        flags = self.flags
        self.flags = []
        return flags

    def verdict(
        self,
        progress: Progress,
        loss: float,
        norm: float,
        largest: Tensor,
        *,
        batch: tuple[dict[str, Any], list[Tensor]],
        predicts: bool = True,
    ) -> SkippedStep | None:
        """Returns why the step must be skipped, or None where it is to be taken.

        Collective where a step is skipped.

        The answer is the same on every rank, whatever the last bits of their norms.

        Args:
            progress: its norms and its count of skipped steps are updated.
            loss: of the step, over all ranks.
            norm: of the gradient.
            largest: [2] on the CPU, both at their largest of any rank; inf where one is not finite.
            batch: its place in the data, and what was noted of it.
            predicts: False where the batch should have had a token to predict and has none, so
                that its loss means nothing.
        """
        cursor, flags = batch
        finite = bool(largest.isfinite().all())
        agreed = largest[1].item()
        usual = median(progress.norms) if len(progress.norms) >= LEAST else math.inf
        if finite and self.optim.skip_above and predicts:
            progress.norms = [*progress.norms, agreed][-WINDOW:]
        if not finite:
            why = f"the loss is {loss} and the gradient norm {norm}"
            way = "lower optim.learning_rate, or choose another precision"
        elif not predicts:
            why = "its batch has no token to predict"
            way = "give documents of more tokens, or a model with a shorter prefix"
        elif self.optim.skip_above and agreed > self.optim.skip_above * usual:
            why = (
                f"the gradient norm {norm:.4g} is more than"
                f" optim.skip_above={self.optim.skip_above:g} times the usual {usual:.4g}"
            )
            way = "raise optim.skip_above"
        else:
            progress.skipped = 0
            return None
        progress.skipped += 1
        return SkippedStep(why, finite, cursor, self._rows(flags), way)

    def bear(self, progress: Progress, skip: SkippedStep) -> None:
        """Ends the run where too many steps were skipped one after another.

        Raises:
            UserError: optim.max_skipped steps were skipped in a row.
        """
        if progress.skipped < self.optim.max_skipped:
            return
        many = (
            "the last step was"
            if progress.skipped == 1
            else f"the last {progress.skipped} steps were"
        )
        raise UserError(
            f"step {progress.step}: {skip.why}; {many} skipped"
            f" (optim.max_skipped={self.optim.max_skipped}), so the run ends; the last checkpoint"
            f" is intact; {skip.way}, and begin again in another run_dir",
            BAD_RUN,
        )

    def _rows(self, flags: Sequence[Tensor]) -> list[int]:
        """Returns the rows of the step, over all ranks, whose loss is not finite somewhere."""
        each = self.share.rows_per_rank
        every = torch.zeros(self.mesh.data.size * each, dtype=torch.float64)
        first = self.mesh.data.rank * each
        every[first : first + each] = torch.cat(list(flags)).double().cpu()[:each]
        return self._most(every).nonzero().flatten().tolist()

    def _most(self, x: Tensor) -> Tensor:
        """Returns the elementwise maximum of a vector over all ranks, on the CPU."""
        x = x.to(self.mesh.device)
        if self.mesh.world.group is not None:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.mesh.world.group)
        return x.cpu()
