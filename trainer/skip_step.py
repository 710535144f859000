"""Whether a step is taken: never where the loss or the gradient is no finite number; on wish not
where the gradient leaps.

A step that is not taken is left out: nothing is multiplied by 0, because 0 x NaN is NaN.
Parameters, the optimiser's state and what layers learn of a step stay bit for bit as they were.
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

LEAST = 16  # fewer tell nothing of what is usual


class SkippedStep(NamedTuple):
    """Why a step was not taken, and where its batch lies."""

    why: str
    finite: bool
    cursor: dict[str, Any]
    rows: list[int]
    way: str

    def row(self) -> dict[str, Any]:
        """As metrics.jsonl holds it."""
        return {"why": self.why, "cursor": self.cursor, "rows": self.rows}

    def line(self, step: int) -> str:
        """As the console shows it."""
        rows = f" (not finite in rows {', '.join(map(str, self.rows))})" if self.rows else ""
        return f"step {step} skipped: {self.why}; its batch is at {self.cursor}{rows}"


class SkipStepGuard:
    """Judges steps; what it remembers is part of Progress, so that a resumed run judges as the run
    never stopped.

    Args:
        optim: `spike`: a gradient norm above this many times the median of the last WINDOW finite
            ones is skipped, once there are LEAST of them; 0 = never. `max_skipped`: steps skipped
            in a row that end the run.

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
        """Note which rows of a micro-batch have a loss that is not finite. losses: [m, c]."""
        self.flags.append(~losses.detach().isfinite().all(1))

    def verdict(
        self, progress: Progress, loss: float, norm: float, *, predicts: bool = True
    ) -> SkippedStep | None:
        """None where the step is to be taken; the same on every rank, whatever the last bits of
        their norms. Collective.

        predicts: False = the batch had no token to predict, and should have had one: its loss is no
            figure.
        """
        flags = self.flags
        self.flags = []
        largest = torch.tensor(
            [x if math.isfinite(x) else math.inf for x in (loss, norm)], dtype=torch.float64
        )
        largest = self._most(largest)
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
        return SkippedStep(why, finite, progress.cursor, self._rows(flags), way)

    def bear(self, progress: Progress, skip: SkippedStep) -> None:
        """After the step was told of. Raises Fault where too many were skipped one after
        another."""
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
        """The rows of the step, over all ranks, of which some token has a loss that is not
        finite."""
        each = self.share.each
        every = torch.zeros(self.mesh.data.size * each, dtype=torch.float64)
        first = self.mesh.data.rank * each
        every[first : first + each] = torch.cat(list(flags)).double().cpu()[:each]
        return self._most(every).nonzero().flatten().tolist()

    def _most(self, x: Tensor) -> Tensor:
        """[n] of each rank -> [n] the largest of all ranks."""
        x = x.to(self.mesh.device)
        if self.mesh.world.group is not None:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.mesh.world.group)
        return x.cpu()
