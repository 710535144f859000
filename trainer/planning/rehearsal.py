"""Steps of the training loop without data, evaluation or files: what a plan and a bench run."""

import gc
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.layer import hook
from models.moe import choice, router, switch
from parallel.activation_offload import ActivationOffload
from parallel.engines.optimizer_offload import OptimizerOffload
from parallel.mesh import Mesh
from trainer.agreement import Marks
from trainer.config.schema import Config
from trainer.data.batch import Batch
from trainer.data.lanes import Lanes
from trainer.data.streams.prefetch import StepCounts, StepInput
from trainer.logs.meters import Meter, Peak
from trainer.loop import Loop
from trainer.optim.selection import count_trained
from trainer.placement import PlacedModel, place
from trainer.progress import Progress, Stretch


@dataclass
class Rehearsal:
    """A model placed on the ranks of a mesh, and the loop that trains it.

    Args:
        config: of the run.
        mesh: the ranks.
        model: as built, on the meta device.
        offload: takes activations to the host in place of the run's own way.
        optimizer_offload: the same of the optimiser's state.
    """

    config: Config
    mesh: Mesh
    model: nn.Module
    offload: ActivationOffload | None = None
    optimizer_offload: OptimizerOffload | None = None
    placement: PlacedModel = field(init=False)
    loop: Loop = field(init=False)

    def __post_init__(self) -> None:
        if hook(self.model, "reads_source"):
            raise ValueError("a model that reads a source is not rehearsed")
        # As in a run, parameters that stand still have neither gradients nor moments.
        count_trained(self.model, self.config.optim.freeze)
        self.placement = place(
            self.config, self.mesh, self.model, self.offload, self.optimizer_offload
        )
        share = self.placement.share
        lanes = None
        if self.config.memory.carries:
            lanes = Lanes(self.mesh, share, self.config.rows)
        self.loop = Loop(
            config=self.config,
            mesh=self.mesh,
            engine=self.placement.engine,
            stream=cast(Any, _NoStream()),
            share=share,
            checkpoints=cast(Any, None),
            schedule=lambda step, steps: 1.0,
            flops=lambda span, source: 0.0,
            meter=Meter(Peak(None, "not asked"), self.mesh.world.size),
            stop=cast(Any, None),
            log=lambda row: None,
            evaluate=lambda progress: None,
            lanes=lanes,
        )
        whole = Stretch(after=0, steps=self.config.steps, extend=None)
        self.progress = Progress(cursor={}, lengths=[whole])
        self.batch = one_document_a_row(self.config)

    def step(self) -> None:
        """Takes a step of the training loop."""
        # What an earlier step left to the garbage collector would be counted in this one.
        gc.collect()
        with _even_routing():
            self._take_step()

    def _take_step(self) -> None:
        share = self.placement.share
        given = StepInput(
            cursor={},
            marks=Marks(),
            figures=StepCounts.of(self.batch, share, self.loop.flops),
            cut=deque(share.in_time(self.batch)),
        )
        self.loop.take_step(self.progress, given)


@contextmanager
def _even_routing() -> Iterator[None]:
    """Has every expert chosen as often as any other, which is what balancing losses aim at.

    The tokens of a rehearsal are all the same and would all visit the same experts.
    """

    def even(scores: Tensor, count: int) -> Tensor:
        shape = router.top_experts(scores, count).shape
        experts = scores.shape[-1]
        return torch.arange(shape.numel(), device=scores.device).remainder(experts).view(shape)

    for module in (choice, switch):
        setattr(module, "top_experts", even)  # noqa: B010
    try:
        yield
    finally:
        for module in (choice, switch):
            setattr(module, "top_experts", router.top_experts)  # noqa: B010


class _NoStream:
    """Stands for the stream of batches, which a rehearsal makes by itself."""

    pauses = False


def one_document_a_row(config: Config) -> Batch:
    """Returns a batch whose rows are one document each."""
    shape = config.rows, config.context_length + 1
    zeros = torch.zeros(shape, dtype=torch.long)
    pos = torch.arange(shape[1]).expand(shape)
    return Batch(tokens=zeros, doc=zeros, pos=pos, role=zeros)
