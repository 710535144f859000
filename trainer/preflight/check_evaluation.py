"""Checks the evaluations that a config names: their classes and settings, then whether they can
judge its model and its data."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from models.layer import hook
from trainer.config.finding import Finding
from trainer.config.instantiate import instantiate
from trainer.config.node_checks import as_node, node_errors
from trainer.config.schema import Config
from trainer.data.sources.base import build_source
from trainer.data.tasks.base import SyntheticTask
from trainer.errors import UserError
from trainer.evaluation.base import Evaluation, RunFacts
from trainer.objectives.stream import objective_of
from trainer.progress import PART

RESERVED = ("sample", "maps", "held_out")  # parts of an evaluation that have no node


def check_evaluation_nodes(config: Config) -> Iterator[Finding | str]:
    """Checks names, classes and settings of the evaluations, without a model."""
    if not config.evaluation.every:
        return
    for name, node in config.evaluation.nodes.items():
        where = f"evaluation.{name}"
        if name in RESERVED or not PART.fullmatch(name):
            yield Finding(
                where,
                fact="this name is taken, or has other signs than letters, digits and _",
                remedy="choose another name",
            )
            continue
        sentences = node_errors(node, {}, where)
        if sentences:
            yield from sentences
            continue
        try:
            evaluation = instantiate(node, {}, where)
        except (UserError, ValueError) as error:
            yield str(error)
            continue
        if not isinstance(evaluation, Evaluation):
            yield Finding(
                f"{where}._target_",
                node.target,
                "it is no evaluation",
                "name a subclass of trainer.evaluation.base.Evaluation",
            )


def check_evaluations(
    config: Config, model: nn.Module, position: Any, vocabulary: int
) -> Iterator[Finding]:
    """Checks that every evaluation can judge the model and the data of a run.

    Args:
        config: a config whose nodes were checked.
        model: of the run, built on the meta device.
        position: of the run.
        vocabulary: tokens that the model knows.
    """
    if not config.evaluation.every:
        return
    limits = length_limits(model, position)
    source = build_source(as_node(config.data))
    for name, node in config.evaluation.nodes.items():
        evaluation = instantiate(node, {}, f"evaluation.{name}")
        facts = RunFacts(
            name=name,
            config=config,
            tokenizer=source.tokenizer(),
            objective=objective_of(config),
            vocabulary=vocabulary,
            limits=limits,
            aimed=isinstance(source, SyntheticTask) and source.aimed,
            reads_source=hook(model, "reads_source"),
        )
        yield from evaluation.findings(facts)


def length_limits(model: nn.Module, position: Any) -> dict[str, int]:
    """Returns {class: tokens of the longest document} of every part that has a limit."""
    limits: dict[str, int] = {}
    for part in (position, *model.modules()):
        limit = hook(part, "max_length")
        if limit is not None:
            limits[type(part).__name__] = limit
    return limits
