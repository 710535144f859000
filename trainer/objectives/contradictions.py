"""Refuses objectives that the data, the model or the evaluation contradict, before any rank starts.

A check yields one message for each fault.
"""

from collections.abc import Iterator

from torch import nn

from models.causality import Ahead, layers_ahead, plain_sight, score_mismatches
from models.masks.algebra import FAR
from trainer.config import build_model
from trainer.config.node_checks import as_node
from trainer.config.schema import Config
from trainer.data.sources.base import Source, build_source
from trainer.errors import UserError
from trainer.objectives.base import Objective
from trainer.objectives.stream import objective_of


def check_objective(config: Config) -> Iterator[str]:
    """Yields the faults of an objective that show without a model: data, memory and sample."""
    try:
        objective = objective_of(config)
    # The check of config nodes reports these.
    except (UserError, ValueError):
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
    source = _source(config)
    if source is not None and source.sets_targets:
        yield (
            f"{key} hides parts of plain text, but {type(source).__name__} says itself what is "
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
    """Returns (tokens of data and objective together, faults of a smaller model.vocabulary)."""
    tokenizer = build_source(as_node(config.data)).tokenizer()
    symbols = objective_of(config).symbols(tokenizer, config.context_length)
    tokens = symbols.vocabulary
    configured = config.model.vocabulary
    if configured is None or configured >= tokens:
        return tokens, []
    added = f" and objective={_name(config)} adds {symbols.added}" if symbols.added else ""
    message = (
        f"model.vocabulary={configured}, but the tokenizer data.tokenizer has {symbols.text} "
        f"tokens{added}; use model.vocabulary={tokens} or null"
    )
    return tokens, [message]


def learns_next(config: Config) -> bool:
    """Tells if targets are later tokens of the row itself, which no layer may show."""
    source = _source(config)
    return objective_of(config).predicts_next and (source is None or not source.aimed)


def check_objective_model(config: Config, model: nn.Module) -> Iterator[str]:
    """Yields the faults of a model that sees its own targets, or whose positions serve no mask."""
    objective = objective_of(config)
    ahead = layers_ahead(model)
    if learns_next(config):
        yield from _in_plain_sight(config, objective, ahead)
    # Two-sided positions without a layer that looks ahead: half of their parameters get no
    # gradient.
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
    """Yields the fault of a next-token loss over layers that see the next token."""
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
        longest = max(ahead, key=lambda layer: layer.causal_from)
        yield (
            f"{key}: {_named([longest])} shows the first {longest.causal_from} tokens of a "
            "document from before them, the answer "
            "among them; the data itself says what is seen from both sides: use "
            f"{_node(config, longest)}.length=0"
        )
    elif ahead:
        longest = max(ahead, key=lambda layer: layer.causal_from)
        # A prefix that is shorter than the row leaves targets, and is a prefix-LM.
        if longest.causal_from > config.context_length:
            yield (
                f"{key}: {_named([longest])} shows the first {longest.causal_from} tokens of a "
                "document from before them, so that "
                f"they are no targets, and a row of context_length={config.context_length} "
                "has no others; use "
                f"{_node(config, longest)}.length={config.context_length // 2} or less"
            )


def remarks(config: Config, model: nn.Module) -> list[str]:
    """Lists combinations that are allowed and probably not intended, a line each for the log."""
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
    """Returns the objective as the command line names it, or the class of a user's own."""
    objective = objective_of(config)
    is_built_in = type(objective).__module__.startswith("trainer.objectives.")
    return objective.name if is_built_in else config.objective.target


def _source(config: Config) -> Source | None:
    """Returns the source of the data; None for data with faults."""
    # The check of the data reports the faults.
    try:
        return build_source(as_node(config.data))
    except ValueError:
        return None


def _named(layers: list[Ahead]) -> str:
    """Names the first of some layers by path and class, and the number of the others."""
    first = f"{layers[0].path} ({layers[0].kind})"
    others = len(layers) - 1
    if not others:
        return first
    plural = "s" if others > 1 else ""
    return f"{first}, like {others} more layer{plural},"


def _node(config: Config, layer: Ahead) -> str:
    """Returns the config key of the settings of a layer's mixer."""
    # A path of a decoder is blocks.NUMBER.mixer...; other architectures have one mixer.
    parts = layer.path.split(".")
    number = int(parts[1]) if len(parts) > 2 and parts[1].isdigit() else 0
    labels = build_model.mixer_labels(config)
    if number >= len(labels):
        return "mixer"
    return build_model.mixer_node(config, labels[number])[0]
