"""Compares the weights that init_from= names with the model that is to take them."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from models.lora import adapter_names
from parallel.engines.materialize import named
from trainer.config.finding import Finding
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.init_from.sources import WeightSource, open_weights
from trainer.run_dir import has_checkpoint

SHOWN = 6  # names of each kind in a message
REMEDY = (
    "give the model the sizes that it has there, or set init_from_strict=false, which leaves these"
    " as they start without init_from"
)


@dataclass(frozen=True)
class ParameterSlots:
    """The tensors of a model that weights can be put into.

    Attributes:
        shapes: of every parameter and every buffer that is saved; tied ones once.
        aliases: {other name of a tied parameter: its first name}.
        optional: names of adapters, which begin by themselves where a source has none.
    """

    shapes: dict[str, torch.Size]
    aliases: dict[str, str]
    optional: frozenset[str] = frozenset()


@dataclass
class Fit:
    """The account of some weights against a model: those that fit, and those that do not.

    Attributes:
        fitting: {name in the model: name in the source}.
        other_shape, missing, left_over, torn: sentences about what does not fit: tensors of another
            shape, tensors of the model that the source lacks, tensors of the source that the model
            lacks, and tensors that differ there and are tied here.
    """

    fitting: dict[str, str] = field(default_factory=dict)
    other_shape: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Describes what does not fit; empty where everything does."""
        kinds = (
            ("of another shape", self.other_shape),
            ("missing there", self.missing),
            ("left over", self.left_over),
            ("tied here and different there", self.torn),
        )
        parts = []
        for kind, entries in kinds:
            if entries:
                more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
                parts.append(f"{len(entries)} {kind}: {', '.join(entries[:SHOWN])}{more}")
        return "; ".join(parts)


def slots_of(model: nn.Module) -> ParameterSlots:
    """Returns the tensors of a model, which may lie on the meta device."""
    aliases = {name: first for name, first in named(model) if name != first}
    shapes = {}
    for name, tensor in model.state_dict().items():
        if name not in aliases:
            shapes[name] = tensor.shape
    return ParameterSlots(shapes, aliases, frozenset(adapter_names(model)))


def compare(source: WeightSource, slots: ParameterSlots) -> Fit:
    """Returns which tensors of a source fit a model."""
    fit = Fit()
    for name, shape in slots.shapes.items():
        where = _place(name, source, slots)
        if where is None:
            if name not in slots.optional:
                fit.missing.append(name)
        elif source.shapes[where] != shape:
            fit.other_shape.append(f"{name} is {[*source.shapes[where]]} there and {[*shape]} here")
        else:
            fit.fitting[name] = where
    fit.left_over += _left_over(source, slots, fit.fitting.values())
    fit.torn += _torn(source, slots.aliases)
    return fit


def _place(name: str, source: WeightSource, slots: ParameterSlots) -> str | None:
    """Returns the name that a source has for a tensor of the model; None where it has none."""
    names = [name, *(alias for alias, first in slots.aliases.items() if first == name)]
    for candidate in names:
        if candidate in source.shapes:
            return candidate
    return source.ties.get(name)


def _left_over(source: WeightSource, slots: ParameterSlots, used: Collection[str]) -> Iterator[str]:
    for name in source.shapes:
        if name not in slots.shapes and name not in slots.aliases and name not in used:
            yield f"{name} {[*source.shapes[name]]}"


def _torn(source: WeightSource, aliases: Mapping[str, str]) -> Iterator[str]:
    """Yields tensors that a model ties and that are different in the source."""
    for alias, first in aliases.items():
        if alias not in source.shapes or first not in source.shapes:
            continue
        same_shape = source.shapes[alias] == source.shapes[first]
        if not same_shape or not torch.equal(source.read(alias), source.read(first)):
            yield f"{alias} and {first}"


def check_one_beginning(config: Config) -> Iterator[Finding]:
    """Checks that a run is told of one place to begin from."""
    if config.init_from is None or config.resume in ("auto", "never"):
        return
    yield Finding(
        "init_from",
        config.init_from,
        f"gives initial weights, and resume={config.resume} goes on from a checkpoint",
        "leave one of the two out",
        causes=("resume",),
    )


def check_init_from(config: Config, model: nn.Module) -> Iterator[Finding | str]:
    """Checks, before any rank starts, that init_from= can be read and fits.

    Args:
        model: the model of the config, without memory.
    """
    if config.init_from is None:
        return
    # A run that has begun has its own weights; where it began from may be gone by now.
    if config.run_dir is not None and has_checkpoint(config.run_dir):
        return
    try:
        fit = compare(open_weights(config.init_from), slots_of(model))
    except UserError as error:
        yield str(error)
        return
    if not fit.fitting:
        yield Finding("init_from", config.init_from, f"nothing of it fits: {fit.text()}", REMEDY)
    elif config.init_from_strict and fit.text():
        yield Finding("init_from", config.init_from, fit.text(), REMEDY)
