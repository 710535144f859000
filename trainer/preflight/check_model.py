"""Wishes that would be dropped without a word, because the model or the data has no place for them:
each is a fault."""

from collections.abc import Iterator

from torch import nn

from models.convolution.hyena import Hyena
from parallel.engines.base import blocks_of
from trainer.config import build_model
from trainer.config.node_checks import as_node
from trainer.config.schema import Config
from trainer.data.sources.base import build_source
from trainer.errors import UserError
from trainer.evaluation.generate import beginning


def check_position_places(config: Config) -> Iterator[str]:
    """Layers that were asked for of a model that takes none."""
    try:
        places = {
            place: build_model.model_takes(config, place) for place in ("mixers", "feedforwards")
        }
    except UserError:  # there is no such class, which is said elsewhere
        return
    asked = config.model
    kind = config.model.target.rpartition(".")[2]
    for key, wish, place in (
        ("mixer", config.mixer, "mixers"),
        ("model.pattern", asked.pattern, "mixers"),
        ("model.mixers", asked.mixers, "mixers"),
        ("model.feedforward", asked.feedforward, "feedforwards"),
        ("model.feedforward_pattern", asked.feedforward_pattern, "feedforwards"),
        ("model.feedforwards", asked.feedforwards, "feedforwards"),
    ):
        if wish and not places[place]:
            yield (
                f"{key} is set, but {kind} takes no {place}; leave {key} out, or use a decoder, for"
                " example model=full"
            )


def check_whole_only(config: Config, model: nn.Module) -> Iterator[str]:
    """What is done block by block, of a model that has no blocks."""
    if blocks_of(model):
        return
    kind = type(model).__name__
    engine = config.engine
    if engine.checkpointing != "none":
        yield (
            f"engine.checkpointing={engine.checkpointing} computes blocks again, and {kind} has"
            " none; use engine.checkpointing=none"
        )
    if engine.compile:
        yield f"engine.compile=true compiles blocks, and {kind} has none; use engine.compile=false"
    if engine.offload_activations:
        yield (
            f"engine.offload_activations=true sends away what blocks save, and {kind} has none; "
            "use engine.offload_activations=false"
        )


def check_lengths(config: Config, model: nn.Module) -> Iterator[str]:
    """A sample that is longer than what a layer of the model can take."""
    wish = config.evaluation
    if not wish.every or not wish.sample_tokens:
        return
    try:
        start = len(beginning(build_source(as_node(config.data)).tokenizer(), wish.prompt))
    except ValueError:  # said elsewhere
        return
    limits = {who: limit for module in model.modules() for who, limit in _limits(module)}
    if not limits:
        return
    who = min(limits, key=lambda name: limits[name])
    room = limits[who] - start + 1  # the last token is drawn and not read
    if wish.sample_tokens <= room:
        return
    way = f"use evaluation.sample_tokens={room}" if room > 0 else "use a shorter evaluation.prompt"
    yield (
        f"evaluation.sample_tokens={wish.sample_tokens}: a sample of so many tokens after {start}"
        f" of the prompt is longer than the {limits[who]} that {who} can take; {way}, or a larger"
        " context_length"
    )


def _limits(module: nn.Module) -> Iterator[tuple[str, int]]:
    """(class, longest document) of a layer that has such a limit."""
    most = (
        module.filter.length if isinstance(module, Hyena) else getattr(module, "max_length", None)
    )
    if isinstance(most, int):
        yield type(module).__name__, most
