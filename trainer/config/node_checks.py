"""Checks that a node of the config can be built: its class, and each of its settings."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from trainer.config.renamed import new_key
from trainer.config.schema import ComponentConfig, ModelConfig
from trainer.config.values import (
    PLAIN,
    TARGET,
    annotations,
    breach,
    classes,
    is_node,
    quoted_value,
    settled,
)
from trainer.errors import UserError
from trainer.files.import_by_name import import_module_of

ALIKE = 0.65  # how alike two words must be for one to be taken for the other, misspelled


def find_class(target: str, where: str) -> type:
    """Returns the class that a dotted name stands for.

    Raises:
        UserError: there is no such class.
    """
    if not isinstance(target, str):
        raise UserError(
            f"{where}.{TARGET}={quoted_value(target)}: a text is needed; name a class as"
            " package.module.Class"
        )
    try:
        module, name = import_module_of(target)
    except ImportError as error:
        raise UserError(f"{where}.{TARGET}={target}: {error}") from error
    found = getattr(module, name, None)
    if not isinstance(found, type):
        known = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module.__name__
        ]
        hint = nearest(name, known)
        raise UserError(f"{where}.{TARGET}={target}: {module.__name__} has no class {name}{hint}")
    return found


def nearest(word: str, known: Any) -> str:
    """Returns '; did you mean X?' or '; known: A, B' for a message about an unknown word."""
    known = sorted({str(each) for each in known})
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(known)}" if known else ""


def nearest_key(key: str, known: Iterable[str]) -> str:
    """Returns the same hint about an unknown setting; a former name gets the present one.

    The last words are compared: a common beginning says nothing.
    """
    known = list(known)
    if (renamed := new_key(key, known)) is not None:
        return f"; it is called {renamed} now"
    by_leaf = {each.rpartition(".")[2]: each for each in known}
    close = difflib.get_close_matches(key.rpartition(".")[2], by_leaf, n=1, cutoff=ALIKE)
    if close:
        return f"; did you mean {by_leaf[close[0]]}?"
    return f"; known: {', '.join(sorted(by_leaf.values()))}" if by_leaf else ""


def parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Returns the named parameters of a constructor, without *args and **kwargs."""
    swallowed = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {
        key: each
        for key, each in inspect.signature(kind).parameters.items()
        if each.kind not in swallowed
    }


def as_node(node: ComponentConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Returns a node as a plain dict of "_target_" and settings."""
    return (
        {TARGET: node.target, **node.settings()}
        if isinstance(node, ComponentConfig)
        else dict(node)
    )


def node_errors(
    node: ComponentConfig | Mapping[str, Any], offers: Mapping[str, Any], where: str
) -> list[str]:
    """Returns why a node cannot be built: unknown class, unknown, unfit or missing settings.

    Args:
        node: the node, or a plain dict of it.
        offers: sizes that the constructor may take without the node setting them.
        where: the place of the node in the config.
    """
    asked = as_node(node)
    try:
        kind = find_class(asked.pop(TARGET), where)
    except UserError as fault:
        return [str(fault)]
    known = parameters(kind)
    sizes = ModelConfig.model_fields.keys() - {"target"} if where == "model" else set()
    free = [f"{where}.{key}" for key in (set(known) - set(offers)) | sizes] or [
        f"{where}.{key}" for key in known
    ]
    faults = [
        f"{where}.{key}={quoted_value(value)}: {kind.__name__} has no such"
        f" setting{_hint(key, where, free, known)}"
        for key, value in asked.items()
        if key not in known
    ]
    for key, each in known.items():
        if each.default is inspect.Parameter.empty and key not in asked and key not in offers:
            offered = f" (the run gives a class here {', '.join(offers)})" if offers else ""
            faults.append(
                f"{where}.{key}: {kind.__name__} needs it and it is not set; write"
                f" {where}.{key}=VALUE{offered}"
            )
    hints = annotations(kind)
    for key, value in asked.items():
        if key in known and (unfit := breach(value, hints.get(key, Any), key)):
            faults.append(
                f"{where}.{key}={quoted_value(value)}:"
                f" {unfit}{_example(f'{where}.{key}', known[key])}"
            )
            continue
        for place, inner in _inner(value, f"{where}.{key}"):
            faults += node_errors(inner, offers, place) or _other_kind(
                inner, hints.get(key, Any), place
            )
    return faults


def _hint(key: str, where: str, free: Iterable[str], known: Iterable[str]) -> str:
    """Returns the hint about an unknown setting: one that may be set, or a size that is alike."""
    hint = nearest_key(f"{where}.{key}", free)
    if "did you mean" in hint or "it is called" in hint:
        return hint
    offered = nearest_key(f"{where}.{key}", [f"{where}.{each}" for each in known])
    return offered if "did you mean" in offered else hint


def _other_kind(node: Mapping[str, Any], wanted: Any, where: str) -> list[str]:
    """Returns the message about a node whose class the constructor does not take."""
    kinds = classes(wanted)
    if not kinds or issubclass(find_class(node[TARGET], where), kinds):
        return []
    names = " or ".join(kind.__name__ for kind in kinds)
    return [f"{where}.{TARGET}={node[TARGET]}: a {names} is needed; name a class of that kind"]


def _example(key: str, parameter: inspect.Parameter) -> str:
    """Returns the remedy that names the default value of the constructor."""
    if parameter.default is inspect.Parameter.empty or not isinstance(parameter.default, PLAIN):
        return ""
    return f"; for example {key}={quoted_value(parameter.default)}"


def _inner(value: Any, where: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the nodes in a setting, each with its place."""
    if is_node(value):
        return [(where, value)]
    if isinstance(value, list | tuple):
        return [found for i, each in enumerate(value) for found in _inner(each, f"{where}.{i}")]
    return []


def normalise_node(node: Any) -> None:
    """Converts settings of a node in place to the types of its class, as 1e3 to 1000."""
    inner = (
        list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
    )
    for value in inner:
        normalise_node(value)
    if not isinstance(node, dict) or not is_node(node):
        return
    try:
        hints = annotations(find_class(node[TARGET], ""))
    except UserError:  # said when the node is judged
        return
    for key, value in node.items():
        node[key] = settled(value, hints.get(key, Any))
