"""Checks for settings that the model or the data has no use for.

Without these checks such a setting would be dropped in silence.
"""

from collections.abc import Iterator

from torch import nn

from models.block import Block
from models.layer import hook
from parallel.engines.base import blocks_of
from parallel.tiles import tileable_blocks
from trainer.config import build_model
from trainer.config.finding import NO_VALUE_SHOWN, Finding
from trainer.config.node_checks import as_node
from trainer.config.schema import Config
from trainer.data.sources.base import build_source
from trainer.errors import UserError
from trainer.evaluation.generate import beginning


def check_layer_settings(config: Config) -> Iterator[Finding]:
    """Refuses settings of layers where the model takes no layers."""
    try:
        takes = {
            parameter: build_model.model_takes(config, parameter)
            for parameter in ("mixers", "feedforwards")
        }
    except UserError:  # the class does not exist, which the check of the node reports
        return
    model = config.model
    model_class = model.target.rpartition(".")[2]
    for key, value, parameter in (
        ("mixer", config.mixer, "mixers"),
        ("model.pattern", model.pattern, "mixers"),
        ("model.mixers", model.mixers, "mixers"),
        ("model.feedforward", model.feedforward, "feedforwards"),
        ("model.feedforward_pattern", model.feedforward_pattern, "feedforwards"),
        ("model.feedforwards", model.feedforwards, "feedforwards"),
    ):
        if value and not takes[parameter]:
            yield Finding(
                key,
                NO_VALUE_SHOWN,
                f"is set, but {model_class} takes no {parameter}",
                f"leave {key} out, or use a decoder, for example model=full",
            )


def check_block_settings(config: Config, model: nn.Module) -> Iterator[Finding]:
    """Refuses settings that act on blocks where the model has no blocks."""
    yield from _check_tiles(config, model)
    if blocks_of(model):
        return
    engine = config.engine
    lacks_blocks = f"and {type(model).__name__} has none"
    if engine.checkpointing != "none":
        yield Finding(
            "engine.checkpointing",
            engine.checkpointing,
            f"computes blocks again, {lacks_blocks}",
            "use engine.checkpointing=none",
        )
    if engine.compile:
        yield Finding(
            "engine.compile",
            True,
            f"compiles blocks, {lacks_blocks}",
            "use engine.compile=false",
        )
    if engine.offload_activations:
        yield Finding(
            "engine.offload_activations",
            True,
            f"sends away what blocks save, {lacks_blocks}",
            "use engine.offload_activations=false",
        )


def _check_tiles(config: Config, model: nn.Module) -> Iterator[Finding]:
    """Refuses tiles where no feed-forward layer treats each token by itself."""
    if config.engine.tile_tokens is None or any(tileable_blocks(model)):
        return
    kinds = {
        type(block.feedforward).__name__ for block in model.modules() if isinstance(block, Block)
    }
    if kinds:
        reason = f"{', '.join(sorted(kinds))} is no such layer"
    else:
        reason = f"{type(model).__name__} has no blocks with one"
    yield Finding(
        "engine.tile_tokens",
        config.engine.tile_tokens,
        f"cuts feed-forward layers that treat each token by itself, and {reason}",
        "use engine.tile_tokens=null",
        causes=("model.feedforward",),
    )


def check_sample_length(config: Config, model: nn.Module) -> Iterator[Finding]:
    """Refuses a sample that is longer than some layer of the model can take."""
    evaluation = config.evaluation
    if not evaluation.every or not evaluation.sample_tokens:
        return
    try:
        tokenizer = build_source(as_node(config.data)).tokenizer()
        prompt_tokens = len(beginning(tokenizer, evaluation.prompt))
    except ValueError:  # reported by the check of the data
        return
    limits: dict[str, int] = {}
    for module in model.modules():
        limit = _longest_document(module)
        if limit is not None:
            limits[type(module).__name__] = limit
    if not limits:
        return
    shortest = min(limits, key=lambda name: limits[name])
    # One token more than the limit fits, because the last token is drawn and never read.
    room = limits[shortest] - prompt_tokens + 1
    if evaluation.sample_tokens <= room:
        return
    if room > 0:
        remedy = f"use evaluation.sample_tokens={room}"
    else:
        remedy = "use a shorter evaluation.prompt"
    yield Finding(
        "evaluation.sample_tokens",
        evaluation.sample_tokens,
        f"after {prompt_tokens} tokens of the prompt the sample is longer than the"
        f" {limits[shortest]} that {shortest} can take",
        f"{remedy}, or a larger context_length",
        causes=("evaluation.prompt", "context_length"),
    )


def _longest_document(module: nn.Module) -> int | None:
    """Returns the number of tokens that a layer is limited to; None where it has no limit."""
    return hook(module, "max_length")


def check_cache(config: Config, model: nn.Module) -> Iterator[Finding]:
    """Refuses a cache that the model cannot generate with, where a run generates."""
    evaluation = config.evaluation
    if not evaluation.every or not evaluation.sample_tokens:
        return
    for sentence in build_model.build_cache(config).misfits(model):
        yield Finding(sentence=sentence)
