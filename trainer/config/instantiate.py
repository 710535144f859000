"""Builds the object that a node of the config describes.

A size on offer (width, heads, position, ...) is given to every constructor whose signature has it,
unless the node sets it itself. So a mixer asks for what it needs by naming it, and a new mixer
needs no edit here.
"""

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.node_checks import as_node, find_class, node_errors, parameters
from trainer.config.schema import ComponentConfig
from trainer.config.values import TARGET, is_node
from trainer.errors import UserError


def taken_offers(
    node: ComponentConfig | Mapping[str, Any], offers: Mapping[str, Any], where: str = "node"
) -> dict[str, Any]:
    """Returns the sizes on offer that the constructor takes and the node does not set itself."""
    asked = as_node(node)
    known = parameters(find_class(asked[TARGET], where))
    return {key: value for key, value in offers.items() if key in known and key not in asked}


def instantiate(
    node: ComponentConfig | Mapping[str, Any], offers: Mapping[str, Any], where: str = "node"
) -> Any:
    """Builds the object that a node describes.

    Args:
        node: `_target_` and settings; a setting that is itself a node, or a list with nodes, is
            built first.
        offers: sizes given to those constructors that have a parameter of that name.
        where: the node's place in the config, for messages.

    Raises:
        UserError: unknown class or setting, or an error of the constructor, with `where` in
            front.
    """
    if faults := node_errors(node, offers, where):
        raise UserError("\n".join(faults))
    asked = as_node(node)
    kind = find_class(asked.pop(TARGET), where)
    settings = {key: _value(value, offers, f"{where}.{key}") for key, value in asked.items()}
    try:
        return kind(**taken_offers(node, offers, where), **settings)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise UserError(f"{where}: {_said(error)}") from error


def _said(error: Exception) -> str:
    """Returns the message of a constructor's error; with its place if it is no ValueError."""
    if isinstance(error, ValueError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}{place}; change what its constructor was given"


def _value(value: Any, offers: Mapping[str, Any], where: str) -> Any:
    if is_node(value):
        return instantiate(value, offers, where)
    if isinstance(value, list | tuple):
        return [_value(each, offers, f"{where}.{i}") for i, each in enumerate(value)]
    return value
