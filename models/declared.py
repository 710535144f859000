"""Attributes by which a module states something about itself, such as `blocks`."""

from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")


def declared(
    module: nn.Module, name: str, kind: type[T] | tuple[type[T], ...], default: Any
) -> Any:
    """The attribute of that name where it is of the kind that is asked for, else `default`.

    A layer may use the same name for something of its own (a method, a parameter): that says
    nothing to us.
    """
    value = getattr(module, name, default)
    return value if isinstance(value, kind) else default
