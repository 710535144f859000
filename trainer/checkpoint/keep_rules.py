"""The keys checkpoint.keep* of a config: their check, and the rules that they make."""

from collections.abc import Collection, Iterator
from pathlib import Path

from trainer.checkpoint.retention import CheckpointRetention, better_of, figure_scores
from trainer.config.finding import Finding
from trainer.config.schema import HELD_OUT, CheckpointConfig, Config


def retention_of(
    wish: CheckpointConfig, ends: Collection[int], directory: Path
) -> CheckpointRetention:
    """Returns the rules by which the checkpoints of a run stay.

    Args:
        wish: what the config says.
        ends: steps between stages, whose checkpoints stay.
        directory: of the run.
    """
    better = wish.best_is or better_of(wish.best)
    return CheckpointRetention(
        newest=wish.keep,
        every=wish.keep_every,
        best=wish.keep_best,
        scores=figure_scores(directory, wish.best, better) if wish.keep_best else None,
        ends=frozenset(ends),
    )


def check_keep_rules(config: Config) -> Iterator[Finding]:
    """Checks that the best checkpoints can be known: each of them has to be evaluated."""
    wish = config.checkpoint
    if not wish.keep_best:
        return
    name = wish.best.partition("/")[0] if "/" in wish.best else HELD_OUT
    nodes = config.evaluation.nodes
    if not config.evaluation.every:
        yield Finding(
            "checkpoint.keep_best",
            wish.keep_best,
            f"goes by {wish.best}, but evaluation.every=0",
            f"use for example evaluation.every={wish.every or 50}",
            causes=("evaluation.every",),
        )
        return
    if name not in nodes:
        yield Finding(
            "checkpoint.best",
            wish.best,
            f"no evaluation {name} is chosen, only {', '.join(nodes)}",
            f"write evaluation=[{','.join([*nodes, name])}], or name a figure of those",
            causes=("evaluation",),
        )
        return
    every = nodes[name].settings().get("every") or config.evaluation.every
    if not wish.every or (isinstance(every, int) and wish.every % every):
        yield Finding(
            "checkpoint.keep_best",
            wish.keep_best,
            f"{wish.best} is measured every {every} steps, and checkpoints are written every"
            f" {wish.every}, so that some would have no figure",
            f"use checkpoint.every={every}",
            causes=("checkpoint.every", "evaluation.every"),
        )
