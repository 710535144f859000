"""Checks for settings that the model or the data has no use for.

Without these checks such a setting would be dropped in silence.
"""

from collections.abc import Iterator

from torch import nn

from models.block import Block
from models.layer import hook
from parallel.engines.base import blocks_of
from parallel.head_groups import groupable_layers, unequal_groups
from parallel.tiles import tileable_blocks
from trainer.config import build_model
from trainer.config.finding import NO_VALUE_SHOWN, Finding
from trainer.config.node_checks import as_node, find_class, node_errors
from trainer.config.schema import Config
from trainer.data.sources.base import build_source
from trainer.errors import UserError
from trainer.evaluation.generate import beginning


def check_layer_settings(config: Config) -> Iterator[Finding]:
    """Refuses settings of layers where the model takes no layers."""
    try:
        takes = {
            parameter: build_model.model_takes(config, parameter)
            for parameter in ("mixers", "feedforwards", "encoder_mixers")
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
        ("model.encoder_pattern", model.encoder_pattern, "encoder_mixers"),
        ("model.encoder_layers", model.encoder_layers, "encoder_mixers"),
        ("model.encoder_position", model.encoder_position, "encoder_mixers"),
    ):
        if value and not takes[parameter]:
            example = "encoder_decoder" if parameter == "encoder_mixers" else "full"
            yield Finding(
                key,
                NO_VALUE_SHOWN,
                f"is set, but {model_class} takes no {parameter}",
                f"leave {key} out, or use a model that does, for example model={example}",
            )


def check_streams(config: Config) -> Iterator[Finding]:
    """Refuses data without a source for a model that reads one, and the other way round."""
    node = as_node(config.data)
    try:
        model_class = find_class(config.model.target, "model")
        # A value out of range may be a size that no machine has: nothing is built with it.
        if node_errors(node, {}, "data"):
            return
        source = build_source(node)
    except (UserError, ValueError):  # reported by the checks of the nodes
        return
    reads = getattr(model_class, "reads_source", False) is True
    name = model_class.__name__
    if reads == source.has_source:
        if reads and config.evaluation.every and config.evaluation.sample_tokens:
            yield Finding(
                "evaluation.sample_tokens",
                config.evaluation.sample_tokens,
                f"a sample continues a prompt, but {name} writes from a source",
                "use evaluation.sample_tokens=0, and evaluation=free_running for what it writes",
            )
        return
    if reads:
        yield Finding(
            "data",
            type(source).__name__,
            f"its documents have no source, and {name} reads one beside each row",
            "use data=pairs or data=reverse, or a decoder, for example model=full",
        )
    else:
        yield Finding(
            "data",
            type(source).__name__,
            f"its documents have a source, which {name} would not read",
            "use model=encoder_decoder or model=seq2seq, or data of one stream",
        )


def check_block_settings(config: Config, model: nn.Module) -> Iterator[Finding]:
    """Refuses settings that act on blocks where the model has no blocks."""
    yield from _check_tiles(config, model)
    yield from _check_head_groups(config, model)
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


def _check_head_groups(config: Config, model: nn.Module) -> Iterator[Finding]:
    """Refuses groups of heads that no layer can make, or that the ranks cannot share."""
    groups = config.engine.head_groups
    if groups is None:
        return
    layers = list(groupable_layers(model))
    unequal = {why for layer in layers if (why := unequal_groups(layer, groups)) is not None}
    if not layers:
        yield Finding(
            "engine.head_groups",
            groups,
            "computes plain attention over heads in groups, and no layer is of that kind",
            "use engine.head_groups=null",
            causes=("mixer",),
        )
    elif unequal:
        yield Finding(
            "engine.head_groups",
            groups,
            "; ".join(sorted(unequal)),
            "choose a number that divides the heads, and a multiple or divisor of the key heads",
            causes=("model.heads", "model.kv_heads"),
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
