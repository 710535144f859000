"""Recipes of several parts: models on each part, and a table of accuracies for each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from scripts.experiments.runner import Budget, run_trials
from scripts.experiments.table import TableColumn, table
from scripts.experiments.trial import Trial, TrialResult

COLUMNS: Mapping[str, TableColumn] = {
    "accuracy": lambda result: result.accuracy,
    "parameters": lambda result: f"{result.parameters:,}",
}


@dataclass(frozen=True)
class ExperimentPart:
    """A task for all models of a recipe.

    Attributes:
        settings: of every trial, after those of the model.
        text: what the table shows, as markdown.
        models: names of those that take part; empty: all.
    """

    settings: tuple[str, ...]
    text: str
    models: tuple[str, ...] = ()


def run_parts(
    models: Mapping[str, tuple[str, ...]],
    parts: Mapping[str, ExperimentPart],
    effort: Budget,
    say: Callable[[str], None],
) -> tuple[str, list[TrialResult]]:
    """Trains the models of every part that is asked for.

    Args:
        models: name in the table -> settings.
        parts: by name.
        effort: seeds, and one part or all.
        say: takes a line as each trial ends.

    Returns:
        (tables of accuracies, as markdown; every result).
    """
    names = [name for name in parts if effort.only in (None, name)]
    jobs = []
    for part in names:
        for model, settings in models.items():
            if parts[part].models and model not in parts[part].models:
                continue
            trial = Trial(f"{part}: {model}", (*settings, *parts[part].settings))
            jobs += [(trial, seed) for seed in effort.numbers()]
    results = run_trials(jobs, effort, say)
    text = []
    for part in names:
        prefix = f"{part}: "
        own = []
        for result in results:
            if result.name.startswith(prefix):
                own.append(replace(result, name=result.name.removeprefix(prefix)))
        text += [parts[part].text, table(own, COLUMNS)]
    return "\n\n".join(text), results
