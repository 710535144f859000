"""Refusals of objectives that the data, the model or the evaluation contradict, before any rank."""

from collections.abc import Iterator

from torch import nn

from models.causality import Ahead, layers_ahead, plain_sight, score_mismatches
from models.masks.algebra import FAR
from trainer.config import build_model
from trainer.config.node_checks import as_node
from trainer.config.schema import Config
from trainer.data.sources.base import build_source
from trainer.data.tasks.base import SyntheticTask
from trainer.errors import UserError
from trainer.objectives.base import Objective
from trainer.objectives.stream import objective_of


def check_objective(config: Config) -> Iterator[str]:
    """Faults of the objective beside the data, the memory and the sample; no model is needed."""
    try:
        objective = objective_of(config)
    except (UserError, ValueError):  # reported where nodes are checked
        return
    key = f"objective={_name(config)}"
    if not isinstance(objective, Objective):
        yield (
            f"objective._target_={config.objective.target} is no objective; use "
            "objective=next_token, masked or span_corruption"
        )
        return
    try:
        objective.words(config.context_length)
    except ValueError as error:
        yield str(error)
    if not objective.rewrites:
        return
    task = _task(config)
    if task is not None:
        yield (
            f"{key} hides parts of plain text, but {type(task).__name__} says itself what is "
            "to be said; use objective=next_token"
        )
    if config.memory.carries and not objective.carries:
        yield (
            f"{key} rewrites each row by itself, but with memory={config.memory.name} rows go "
            "on from row to row; "
            "use memory=none or objective=next_token"
        )
    if config.evaluation.sample_tokens:
        yield (
            f"evaluation.sample_tokens={config.evaluation.sample_tokens} writes token after token, "
            f"which {key} does not teach; "
            "use evaluation.sample_tokens=0"
        )


def vocabulary(config: Config) -> tuple[int, list[str]]:
    """Tokens of data and objective together, and the fault of a model.vocabulary below that."""
    tokenizer = build_source(as_node(config.data)).tokenizer()
    symbols = objective_of(config).symbols(tokenizer, config.context_length)
    tokens = symbols.vocabulary
    asked = config.model.vocabulary
    if asked is None or asked >= tokens:
        return tokens, []
    more = f" and objective={_name(config)} adds {symbols.added}" if symbols.added else ""
    return tokens, [
        f"model.vocabulary={asked}, but the tokenizer data.tokenizer has {symbols.text} "
        f"tokens{more}; "
        f"use model.vocabulary={tokens} or null"
    ]


def learns_next(config: Config) -> bool:
    """Whether targets are tokens of the row that stand behind those that predict them."""
    task = _task(config)
    return objective_of(config).predicts_next and (task is None or not task.aimed)


def check_objective_model(config: Config, model: nn.Module) -> Iterator[str]:
    """Faults of a model that is shown what it is to predict, or whose positions serve no mask."""
    objective = objective_of(config)
    ahead = layers_ahead(model)
    if learns_next(config):
        yield from _in_plain_sight(config, objective, ahead)
    useless = [path for path, two_sided in score_mismatches(model) if two_sided]
    if useless and not ahead:
        kind = config.position.target.rpartition(".")[2]
        yield (
            f"position.bidirectional=true: half of what {kind} learns serves keys that come later"
            f" than their query, and no layer shows any ({useless[0]}); use"
            " position.bidirectional=false, or objective=masked with layers that see both sides,"
            " as model=bidirectional"
        )


def _in_plain_sight(config: Config, objective: Objective, ahead: list[Ahead]) -> Iterator[str]:
    """A loss of the next token over layers that see it."""
    key = f"objective={_name(config)}"
    unlimited = [layer for layer in ahead if layer.causal_from >= FAR]
    if unlimited:
        yield (
            f"{key}: {_named(unlimited)} shows a token what comes after it in its document, "
            "and so its own target; use "
            "objective=masked, whose targets are hidden from both sides, or causal layers, "
            "for example mixer=full"
        )
    elif ahead and objective.rewrites:
        most = max(ahead, key=lambda layer: layer.causal_from)
        yield (
            f"{key}: {_named([most])} shows the first {most.causal_from} tokens of a document "
            "from before them, the answer "
            "among them; the data itself says what is seen from both sides: use "
            f"{_node(config, most)}.length=0"
        )
    elif ahead:
        most = max(ahead, key=lambda layer: layer.causal_from)
        if most.causal_from > config.context_length:
            yield (
                f"{key}: {_named([most])} shows the first {most.causal_from} tokens of a "
                "document from before them, so that "
                f"they are no targets, and a row of context_length={config.context_length} "
                "has no others; use "
                f"{_node(config, most)}.length={config.context_length // 2} or less"
            )


def remarks(config: Config, model: nn.Module) -> list[str]:
    """Combinations that are allowed and may still not be meant; a line each for the log."""
    objective = objective_of(config)
    lines = []
    if not objective.predicts_next and plain_sight(model) < FAR:
        lines.append(
            f"objective={_name(config)}: no layer sees what comes after a token, so each "
            "hidden one is said from those before "
            "it alone; model=bidirectional sees both sides"
        )
    if any(not two_sided for _, two_sided in score_mismatches(model)):
        kind = config.position.target.rpartition(".")[2]
        lines.append(
            f"position: {kind} counts all keys that come later as at distance 0; "
            "position.bidirectional=true tells them apart"
        )
    return lines


def _name(config: Config) -> str:
    """The objective as the command line names it, or its class where that is a user's own."""
    objective = objective_of(config)
    ours = type(objective).__module__.startswith("trainer.objectives.")
    return objective.name if ours else config.objective.target


def _task(config: Config) -> SyntheticTask | None:
    """The task that the data is, or None where it is text or cannot be had (reported elsewhere)."""
    try:
        source = build_source(as_node(config.data))
    except ValueError:
        return None
    return source if isinstance(source, SyntheticTask) else None


def _named(layers: list[Ahead]) -> str:
    """The first of some layers by its place and class, and how many more there are."""
    first = f"{layers[0].path} ({layers[0].kind})"
    more = len(layers) - 1
    if not more:
        return first
    return f"{first}, like {more} more layer{'s' if more > 1 else ''},"


def _node(config: Config, layer: Ahead) -> str:
    """Where the settings of a layer's mixer stand in the config."""
    parts = layer.path.split(".")
    labels = build_model.mixer_labels(config)
    number = int(parts[1]) if len(parts) > 2 and parts[1].isdigit() else 0
    return build_model.mixer_node(config, labels[number])[0] if number < len(labels) else "mixer"
