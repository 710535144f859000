"""Base class of evaluations: what one is checked by before ranks start, works with, and returns.

An evaluation is one class, here or in a package of the user, and one file of conf/evaluation/ that
names it; `evaluation=[NAME,NAME]` chooses some. Every rank calls the same methods in the same
order.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.micro_batch import MicroBatch
from models.ranges import Range
from parallel.mesh import Mesh
from trainer.agreement import mark
from trainer.config.finding import Finding
from trainer.config.instantiate import instantiate
from trainer.config.schema import HELD_OUT, Config
from trainer.data.batch import Batch
from trainer.data.batch_sharding import BatchSharder
from trainer.data.lanes import Lanes, in_pieces
from trainer.data.sources.base import Source
from trainer.data.streams.base import Stream
from trainer.data.tasks.base import Numbers
from trainer.data.tokenizers import Tokenizer
from trainer.objectives.base import Objective

Every = Annotated[int, Range(1, 2**36)] | None
HELD_OUT_PART = "held_out"  # of the evaluation named heldout, in checkpoints and messages


class Figure(NamedTuple):
    """One value of an evaluation.

    Attributes:
        name: within the evaluation.
        value: a share of 1, or a loss in nats per token.
        chance: what a model that rates every token alike would get; None where that says nothing.
        cells: what the value is made of: rows with the same keys, of numbers and short texts.
    """

    name: str
    value: float
    chance: float | None = None
    cells: Sequence[dict[str, Any]] = ()


class Interrupted(Exception):
    """A signal asked the run to stop, on all ranks, while an evaluation was at work."""


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run before its ranks start, by which the settings of an evaluation are judged.

    Attributes:
        name: of the evaluation, its key below `evaluation.`.
        config: of the run.
        tokenizer: of its data.
        objective: that makes inputs and targets.
        vocabulary: tokens that the model knows.
        limits: {class of a part of the model: tokens of the longest document that it can take}.
        aimed: the data has targets of its own, which are not the next tokens.
        reads_source: the model reads a source beside each row.
    """

    name: str
    config: Config
    tokenizer: Tokenizer
    objective: Objective
    vocabulary: int
    limits: dict[str, int]
    aimed: bool = False
    reads_source: bool = False

    def key(self, setting: str) -> str:
        """Returns the dotted key of a setting of this evaluation."""
        return f"evaluation.{self.name}.{setting}"

    def check_streams(self, setting: str, data: Source) -> Iterator[Finding]:
        """Checks that data of an evaluation's own has a source where the model reads one."""
        if data.has_source == self.reads_source:
            return
        has = "has sources" if data.has_source else "has no sources"
        reads = "reads one beside each row" if self.reads_source else "reads none"
        yield Finding(
            self.key(setting),
            type(data).__name__,
            f"it {has}, and the model {reads}",
            "use data of the kind that the model was trained on",
        )

    def check_length(self, setting: str, value: Any, tokens: int) -> Iterator[Finding]:
        """Checks that the model can take documents of so many tokens."""
        if not self.limits:
            return
        part = min(self.limits, key=lambda name: self.limits[name])
        limit = self.limits[part]
        if tokens > limit:
            yield Finding(
                self.key(setting),
                value,
                f"a row of {tokens} tokens is longer than {part} (max_length={limit}) allows",
                f"use {limit} tokens or fewer, or position=rope, which has no limit",
            )


@dataclass
class EvaluationContext:
    """Everything that an evaluation works with while the ranks run.

    Attributes:
        config: of the run.
        model: in evaluation mode, on the ranks of `share`.
        share: cuts batches of the run's shape for this rank.
        stream: held-out data of the run.
        lanes: makes empty lanes for a sharder where `memory=` carries a state, else returns None.
        step: of the run.
        stopped: collective; receives the mark of a batch and its description; True to stop.
    """

    config: Config
    model: nn.Module
    share: BatchSharder
    stream: Stream
    lanes: Callable[[BatchSharder], Lanes | None]
    step: int
    stopped: Callable[..., bool]

    @property
    def mesh(self) -> Mesh:
        return self.share.mesh

    @property
    def tokenizer(self) -> Tokenizer:
        return self.stream.tokenizer

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return self.config.model.vocabulary or self.stream.vocabulary

    def sharder(self, rows: int, tokens: int) -> BatchSharder:
        """Returns what cuts batches of another shape in the way of the run.

        Rows that are cut in time are cut into pieces no longer than those of the run.
        """
        time = 1 if self.share.time == 1 else -(-tokens // self.share.piece_tokens)
        return BatchSharder(
            self.mesh,
            rows=rows,
            context_length=tokens,
            micro_batch="auto",
            policy=self.share.policy,
            prefix=self.share.prefix,
            time=time,
        )

    def pieces(self, batch: Batch, what: str) -> Iterator[MicroBatch]:
        """Yields this rank's micro-batches of rows that are the same on every rank.

        Under parallel.time these are pieces of rows, and the model is called with each of them
        once, in order.

        Raises:
            Interrupted: on all ranks, before anything of the batch is computed.
        """
        self.check_signal(batch, what)
        rows, columns = batch.tokens.shape
        yield from in_pieces(self.sharder(rows, columns - 1), batch)

    def check_signal(self, batch: Batch, what: str) -> None:
        """Raises Interrupted where a signal asked the run to stop. Collective."""
        if self.stopped(mark(batch), what):
            raise Interrupted

    def total(self, sums: Tensor) -> Tensor:
        """Adds up the tensors of all ranks; the sum lies on the CPU."""
        if self.mesh.world.group is not None:
            dist.all_reduce(sums, group=self.mesh.world.group)
        return sums.cpu()


class Evaluation(ABC):
    """Judges a model while it trains, or offline.

    Args:
        every: steps between two; None = as often as evaluation.every says.

    Attributes:
        needs_text: it writes text of its own, so the run's data must be text.
        needs_next_token: it scores next tokens, so the model must have learned to predict them.
        reads_source: it reads the run's own rows, with their sources where they have them.
    """

    needs_text: ClassVar[bool] = False
    needs_next_token: ClassVar[bool] = True
    reads_source: ClassVar[bool] = False

    def __init__(self, *, every: Every = None):
        self.every = every

    def findings(self, facts: RunFacts) -> Iterator[Finding]:
        """Yields why the evaluation cannot judge this run, in one process before ranks start."""
        if facts.reads_source and not self.reads_source:
            yield Finding(
                "evaluation",
                facts.name,
                "it writes rows of its own, and the model reads a source beside each",
                "use evaluation=[heldout,free_running]",
            )
            return
        if self.needs_next_token and facts.objective.rewrites:
            yield Finding(
                "evaluation",
                facts.name,
                f"it scores the next token, which objective={facts.objective.name} does not teach",
                "use objective=next_token, or leave this evaluation out",
            )
            return
        if self.needs_text and isinstance(facts.tokenizer, Numbers):
            remedy = "choose data of text, or evaluation=[heldout,recall,copy]"
            yield Finding(
                "evaluation",
                facts.name,
                "it reads and writes text, but the run's data is a task of numbers",
                remedy,
            )
            return
        if self.needs_next_token and facts.aimed:
            yield Finding(
                "evaluation",
                facts.name,
                "it scores the next token, but the answers of the run's data are no next tokens",
                "use evaluation=[heldout,tasks], which grade the data's own answers",
            )
            return
        yield from self.check(facts)

    def check(self, facts: RunFacts) -> Iterator[Finding]:
        """Yields faults of the settings for this run; an evaluation without limits has none."""
        yield from ()

    @abstractmethod
    def run(self, context: EvaluationContext) -> list[Figure]:
        """Computes the figures, the most telling first, the same on every rank.

        Raises:
            Interrupted: a signal asked the run to stop.
        """


def build_evaluations(config: Config) -> dict[str, Evaluation]:
    """Builds the evaluations that a config chooses, by name.

    Raises:
        UserError: an unknown class or setting.
    """
    evaluations: dict[str, Evaluation] = {}
    for name, node in config.evaluation.nodes.items():
        evaluations[name] = instantiate(node, {}, f"evaluation.{name}")
    return evaluations


def part_of(name: str) -> str:
    """Returns the name under which a checkpoint owes an evaluation."""
    return HELD_OUT_PART if name == HELD_OUT else name


def figure_name(name: str, figure: str) -> str:
    """Returns the name of a figure in logs; those of the held-out loss bear no prefix."""
    return figure if name == HELD_OUT else f"{name}/{figure}"


def uniform_loss(vocabulary: int) -> float:
    """Returns the loss of a model that rates every token alike, in nats per token."""
    return math.log(vocabulary)


def mean(values: Sequence[float]) -> float:
    """Returns the mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def on_device(context: EvaluationContext, *shape: int) -> Tensor:
    """Returns zeros of float64 to add up in, on this rank's device."""
    return torch.zeros(*shape, dtype=torch.float64, device=context.mesh.device)
