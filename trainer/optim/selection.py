"""Parameters that patterns choose: those that stay frozen, and groups with settings of their own.

A pattern is a shell pattern over the whole name that a checkpoint has for a parameter: `*` stands
for any letters, dots too, so that `blocks.0.*` is everything in the first block. A tied parameter
is chosen by any of its names.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from trainer.config.finding import Finding
from trainer.config.node_checks import nearest
from trainer.config.schema import Config

SHOWN = 6  # names in a message


def chosen(model: nn.Module, patterns: Collection[str]) -> set[str]:
    """Returns the names of the parameters that a pattern chooses; of a tied one the first name."""
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    names: set[str] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            names.add(first_names[id(parameter)])
    return names


def count_trained(model: nn.Module, frozen: Collection[str]) -> int:
    """Excludes the parameters that a pattern chooses from training; counts those that are left."""
    names = chosen(model, frozen)
    count = 0
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            count += parameter.numel()
    return count


def group_settings(
    model: nn.Module, groups: Sequence[Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Returns the settings of each parameter that a group chooses; the first group counts."""
    settings: dict[str, Mapping[str, Any]] = {}
    for group in groups:
        for name in chosen(model, group["match"]):
            settings.setdefault(name, group)
    return settings


def check_selection(config: Config, model: nn.Module) -> Iterator[Finding]:
    """Checks that every pattern chooses a parameter, and that something is left to train.

    Args:
        model: of the config, without memory.
    """
    optim = config.optim
    for pattern in optim.freeze:
        if not chosen(model, [pattern]):
            yield _chooses_nothing("optim.freeze", optim.freeze, pattern, model)
    taken: set[str] = set()
    for index, group in enumerate(optim.groups):
        where = f"optim.groups.{index}.match"
        names: set[str] = set()
        for pattern in group.match:
            own = chosen(model, [pattern])
            if not own:
                yield _chooses_nothing(where, group.match, pattern, model)
            names |= own
        if names and names <= taken:
            yield Finding(
                where,
                group.match,
                "groups before it have chosen all of these parameters, and the first group counts",
                "put the narrower pattern first",
            )
        taken |= names
    frozen = chosen(model, optim.freeze)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if optim.freeze and trained <= frozen:
        yield Finding(
            "optim.freeze",
            optim.freeze,
            "it chooses every parameter that is trained, and nothing is left to train",
            "leave some out",
        )


def _chooses_nothing(key: str, value: list[str], pattern: str, model: nn.Module) -> Finding:
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return Finding(
        key, value, f"no parameter is called {pattern}", _way(pattern, names).lstrip("; ")
    )


def _way(pattern: str, names: Iterable[str]) -> str:
    """Returns a hint: the nearest name, or the first few."""
    names = list(names)
    hint = nearest(pattern, names)
    if hint.startswith("; known"):
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return f"; known: {', '.join(names[:SHOWN])}{more}; * stands for any letters"
    return hint
