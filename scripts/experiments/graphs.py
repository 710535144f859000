"""The recipe `graphs`: learned weights of neighbours, and their mean.

Protocol: one learning rate, one number of steps and the same widths for all models of a part;
figures are the accuracy on unseen graphs, or on the held-out nodes of a graph.
"""

from collections.abc import Callable

from scripts.experiments.parts import ExperimentPart, run_parts
from scripts.experiments.runner import Budget
from scripts.experiments.trial import TrialResult

COMMON = (
    "data=graphs",
    "model.width=32",
    "model.heads=4",
    "optim.weight_decay=0",
    "optim.learning_rate=0.005",
)
MODELS = {
    "GATv2": ("model=gat", "model.scoring=gatv2"),
    "GAT": ("model=gat", "model.scoring=gat"),
    "mean of neighbours": ("model=gat", "model.scoring=mean"),
}
PARTS = {
    "trust": ExperimentPart(
        (*COMMON, "context_length=96", "batch_tokens=768", "steps=300"),
        "### Unseen graphs\nClasses of nodes that name a wrong one, in graphs of 24 to 48 nodes"
        " that were never seen. A node reads 6 others: 0.7 of them are of its class, and 0.4 name"
        " theirs and are trusted. A guess is right 0.25 of the time.",
    ),
    "karate": ExperimentPart(
        (
            *COMMON,
            "data.graph=karate",
            "data.held_out=0.7",
            "context_length=34",
            "batch_tokens=34",
            "model.feature_dropout=0.6",
            "model.weight_dropout=0.6",
            "steps=150",
            "evaluation.batches=1",
        ),
        "### A single graph\nThe side that 24 held-out members of the karate club took, where those"
        " of the other 10 are known; either side has half of all members.",
    ),
}


def graphs(effort: Budget, say: Callable[[str], None]) -> tuple[str, list[TrialResult]]:
    """Returns (what the recipe found, as markdown; every trial)."""
    return run_parts(MODELS, PARTS, effort, say)
