"""Checks of the data that a config names."""

from collections.abc import Iterator

from trainer.config.node_checks import as_node, node_errors
from trainer.config.schema import Config
from trainer.data.open import check as look_at
from trainer.data.sources.base import build_source
from trainer.data.tasks.base import SyntheticTask


def check_prompt(config: Config) -> Iterator[str]:
    """A sample of a task's data: of one whose answers are no next tokens, or from a prompt that is
    none of its tokens."""
    if not config.evaluation.sample_tokens:
        return
    try:
        source = build_source(as_node(config.data))
    except ValueError:  # said elsewhere
        return
    if not isinstance(source, SyntheticTask):
        return
    if source.aimed:
        kind = type(source).__name__
        yield (
            f"evaluation.sample_tokens={config.evaluation.sample_tokens} writes token after token,"
            f" but what {kind} wants said is no next token; use evaluation.sample_tokens=0"
        )
        return
    try:
        source.tokenizer().encode(config.evaluation.prompt)
    except ValueError as error:
        yield f"evaluation.prompt={config.evaluation.prompt}: {error}"


def check_data(config: Config) -> Iterator[str]:
    """Whether the data is there and can be read, as far as a quick look tells."""
    node = as_node(config.data)
    if config.evaluation.every and node.get("held_out") == 0:
        yield (
            "data.held_out=0 keeps nothing to evaluate on; use data.held_out=0.02, or"
            " evaluation.every=0"
        )
    if faults := node_errors(node, {}, "data"):
        yield from faults
    else:
        evaluates = bool(config.evaluation.every) and node.get("held_out") != 0
        yield from look_at(
            node,
            evaluates=evaluates,
            context_length=config.context_length,
            lanes=config.memory.carries,
        )
        yield from check_prompt(config)
