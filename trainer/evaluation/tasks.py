"""Tasks of the trainer as evaluations, graded as in training, over one or two of their settings."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from omegaconf import OmegaConf

from models.ranges import Range
from trainer.config.finding import Finding
from trainer.config.groups import choices, file_of
from trainer.config.node_checks import as_node, nearest, node_errors
from trainer.config.schema import Config
from trainer.config.values import TARGET
from trainer.data.batch_sharding import BatchSharder
from trainer.data.errors import DataError
from trainer.data.sources.base import build_source
from trainer.data.streams.synthetic import SyntheticStream
from trainer.data.tasks.base import SyntheticTask
from trainer.evaluation.base import (
    Evaluation,
    EvaluationContext,
    Every,
    Figure,
    Interrupted,
    RunFacts,
    mean,
)
from trainer.evaluation.held_out import HeldOutResult, evaluate


class Tasks(Evaluation):
    """Held-out examples of a task, graded by the task, for one value of a setting after another.

    Over two settings there is a figure for every combination; those of length and depth are drawn
    as a heat map.

    Args:
        task: a task of data=NAME, or package.module.Class; None = that of the run. Its tokens must
            be tokens of the model.
        settings: of the task, over those of its file in conf/data/.
        vary: name of a setting of the task, such as length or pairs; None = none.
        values: of that setting.
        across: name of a second setting; None = none.
        across_values: of the second setting.
        rows: in a batch; each holds as many examples as fit.
        batches: for each value.
        every: as in Evaluation.
    """

    needs_next_token = False
    reads_source = True

    def __init__(
        self,
        *,
        task: str | None = None,
        settings: dict = {},  # noqa: B006 - never written to
        vary: str | None = None,
        values: list[Any] = [],  # noqa: B006 - never written to
        across: str | None = None,
        across_values: list[Any] = [],  # noqa: B006 - never written to
        rows: Annotated[int, Range(1, 4096)] = 8,
        batches: Annotated[int, Range(1, 4096)] = 4,
        every: Every = None,
    ):
        super().__init__(every=every)
        if (vary is None) != (not values):
            raise ValueError("vary and values belong together; give both, or none")
        if (across is None) != (not across_values):
            raise ValueError("across and across_values belong together; give both, or none")
        if across is not None and (vary is None or across == vary):
            raise ValueError("across names a second setting; give another one as vary")
        self.task = task
        self.settings = settings
        self.vary = vary
        self.values = values
        self.across = across
        self.across_values = across_values
        self.rows = rows
        self.batches = batches

    def check(self, facts: RunFacts) -> Iterator[Finding]:
        if self.task is not None and "." not in self.task and self.task not in choices("data"):
            yield Finding(
                facts.key("task"),
                self.task,
                f"there is no task of that name{nearest(self.task, task_names())}",
            )
            return
        for place in self._places():
            yield from self._check_place(facts, place)

    def _check_place(self, facts: RunFacts, place: Mapping[str, Any]) -> Iterator[Finding]:
        node = self._node(facts.config, place)
        where = facts.key("settings") if self.task is not None else facts.name
        if sentences := node_errors(node, {}, where):
            yield Finding(sentence=sentences[0])
            return
        try:
            task = build_source(node)
            if not isinstance(task, SyntheticTask):
                yield Finding(
                    facts.key("task"),
                    self.task,
                    f"{type(task).__name__} is text, and only a task can be graded",
                    f"use one of {', '.join(task_names())}",
                )
                return
            stream = self._stream(task, facts.config.context_length)
            yield from facts.check_streams("task", task)
        except (DataError, ValueError) as error:
            yield Finding(sentence=f"evaluation.{facts.name}: {error}")
            return
        setting = "settings" if self.vary is None else "values"
        stated = self.settings if self.vary is None else self.values
        yield from facts.check_length(setting, stated, stream.context_length)
        if task.vocabulary > facts.vocabulary:
            yield Finding(
                facts.key(setting),
                stated,
                f"{type(task).__name__} has {task.vocabulary} tokens and the model knows"
                f" {facts.vocabulary}",
                f"set model.vocabulary={task.vocabulary} or more",
            )

    def run(self, context: EvaluationContext) -> list[Figure]:
        cells: list[dict[str, Any]] = []
        for place in self._places():
            task = build_source(self._node(context.config, place))
            assert isinstance(task, SyntheticTask), "check requires it"
            stream = self._stream(task, context.config.context_length)
            result = self._evaluate(context, stream)
            # Every example has a target, so there is a loss.
            cells.append({**place, **result.graded, "loss": result.loss, "tokens": result.tokens})
        names = [
            name for name in cells[0] if name not in (self.vary, self.across, "tokens", "loss")
        ]
        figures: list[Figure] = []
        for name in [*names, "loss"]:
            values = [cell[name] for cell in cells if cell.get(name) is not None]
            figures.append(Figure(name, mean(values), None, () if figures else cells))
        return figures

    def _evaluate(self, context: EvaluationContext, stream: SyntheticStream) -> HeldOutResult:
        share: BatchSharder = context.sharder(self.rows, stream.context_length)
        result = evaluate(context.model, share, stream, self.batches, context.stopped)
        if result is None:
            raise Interrupted
        return result

    def _stream(self, task: SyntheticTask, context_length: int) -> SyntheticStream:
        # A row longer than the training's where one example needs it.
        tokens = max(context_length, task.longest)
        return SyntheticStream(
            task, context_length=tokens, rows=self.rows, seed=0, split="held_out"
        )

    def _places(self) -> list[dict[str, Any]]:
        """Returns every combination of the values of the settings that vary; {} where none does."""
        places: list[dict[str, Any]] = [{}]
        for name, values in ((self.vary, self.values), (self.across, self.across_values)):
            if name is not None:
                places = [{**place, name: value} for place in places for value in values]
        return places

    def _node(self, config: Config, place: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the node of the task with the settings that vary at one place."""
        if self.task is None:
            node = as_node(config.data)
        elif "." in self.task:
            node = {TARGET: self.task}
        else:
            plain = OmegaConf.to_container(OmegaConf.load(file_of("data", self.task)))
            assert isinstance(plain, Mapping), "a file of a group is a mapping"
            node = {str(key): setting for key, setting in plain.items()}
        return {**node, **self.settings, **place}


def task_names() -> list[str]:
    """Returns the names of conf/data/ that are tasks."""
    names = []
    for name in choices("data"):
        node = OmegaConf.load(file_of("data", name))
        if ".tasks." in str(OmegaConf.select(node, TARGET)):
            names.append(name)
    return names
