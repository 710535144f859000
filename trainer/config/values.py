"""Checks the settings of a node against the annotations of its class's constructor.

A constructor's annotations are all that is known of a class before it is built, ours or a user's.
What has no annotation, or one that says nothing of values (a callable, a type variable), is left to
the constructor.
"""

import math
import types
from collections.abc import Mapping, Sequence, Set
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from models.ranges import Range

TARGET = "_target_"
NO_VALUE = "null is needed"
LOWEST = 1e-37  # real numbers that float32 holds in full
HIGHEST = 1e38
PLAIN = (bool, int, float, str, type(None))
LARGEST = 2**36  # of anything: more tokens, channels or steps than any machine has
LISTS = (list, tuple, set, frozenset, Sequence, Set)


def annotations(kind: type) -> dict[str, Any]:
    """Returns the annotations of a constructor; none where one of them cannot be resolved."""
    try:
        return get_type_hints(kind.__init__, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


def is_node(value: Any) -> bool:
    """Tells whether a value is a node, which names a class of its own."""
    return isinstance(value, Mapping) and TARGET in value


def breach(value: Any, wanted: Any, key: str = "") -> str | None:
    """Returns why a value does not fit an annotation; None where it fits.

    Args:
        value: plain data, or a node.
        wanted: an annotation.
        key: the setting's name; `seed` may be as large as 63 bits allow.
    """
    if isinstance(value, float) and (unfit := magnitude(value)):
        return unfit
    if wanted is Any or isinstance(wanted, TypeVar):
        return None
    origin = get_origin(wanted)
    if origin is Annotated:
        return _annotated(value, wanted, key)
    if origin in (Union, types.UnionType):
        facts = [breach(value, branch, key) for branch in get_args(wanted)]
        said = [fact for fact in facts if fact is not None and fact != NO_VALUE]
        return None if None in facts else " or ".join(dict.fromkeys(said))
    if origin is Literal:
        return (
            None
            if value in get_args(wanted) and not _confused(value, wanted)
            else _choices(get_args(wanted))
        )
    if origin in LISTS or wanted in LISTS:
        return _listed(value, wanted, key)
    if wanted is int:
        return _whole(value, 2**63 - 1 if key == "seed" else LARGEST)
    return _plain(value, origin or wanted)


def magnitude(value: float) -> str | None:
    """Returns why a real number is refused: not finite, or beyond what float32 can hold."""
    if not math.isfinite(value):
        return "a finite number is needed"
    if abs(value) > HIGHEST:
        return f"float32 holds nothing beyond {HIGHEST:g}"
    if 0 < abs(value) < LOWEST:
        return f"float32 holds nothing between 0 and {LOWEST:g}"
    return None


def _annotated(value: Any, wanted: Any, key: str) -> str | None:
    inner, *notes = get_args(wanted)
    unfit = breach(value, inner, key)
    if unfit or not isinstance(value, int | float):
        return unfit
    facts = [note.breach(value) for note in notes if isinstance(note, Range)]
    return next((fact for fact in facts if fact), None)


def _confused(value: Any, wanted: Any) -> bool:
    """Tells whether a value equals a choice of another type only, as 1 and true."""
    return not any(type(choice) is type(value) and choice == value for choice in get_args(wanted))


def _choices(choices: Sequence[Any]) -> str:
    return f"choose one of {', '.join(map(str, choices))}"


def _listed(value: Any, wanted: Any, key: str) -> str | None:
    if not isinstance(value, list | tuple):
        return "a list is needed, as [a,b]"
    inner = get_args(wanted)
    fixed = (get_origin(wanted) or wanted) is tuple and Ellipsis not in inner
    if not inner:
        return None
    if fixed and len(inner) != len(value):
        return f"a list of {len(inner)} is needed"
    every = inner if fixed else [inner[0]] * len(value)
    facts = [breach(part, kind, key) for part, kind in zip(value, every, strict=True)]
    return next((f"{fact}, in each place of the list" for fact in facts if fact), None)


def _whole(value: Any, largest: int) -> str | None:
    """Returns why a value is no whole number; a whole float, as 1e3, is one, and true is not."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not float(value).is_integer()
    ):
        return "a whole number is needed"
    return (
        f"it must be at most {largest}, no machine has that many" if abs(value) > largest else None
    )


def _plain(value: Any, wanted: Any) -> str | None:
    """Returns why a value is not of one of the types that YAML has."""
    if wanted is bool:
        return None if isinstance(value, bool) else "true or false is needed"
    if wanted is float:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if real and isinstance(value, int) and value.bit_length() > 1000:
            return "a number that a machine can hold is needed"
        return None if real else "a number is needed"
    if wanted is str:
        return None if isinstance(value, str) else "a text is needed"
    if wanted in (None, type(None)):
        return None if value is None else NO_VALUE
    if wanted in (dict, Mapping):
        return None if isinstance(value, Mapping) else "a group of settings is needed"
    if is_node(value) or not isinstance(wanted, type) or getattr(wanted, "_is_protocol", False):
        return None  # of a node's class the one who builds it judges
    return f"a {wanted.__name__} is needed, written as {{{TARGET}: package.module.Class}}"


def settled(value: Any, wanted: Any) -> Any:
    """Converts a value to the type of its annotation where that loses nothing, as 1e3 to 1000."""
    if isinstance(value, list | tuple):
        inner = [part for part in _members(wanted) if part is not Ellipsis]
        return [settled(part, inner[0] if inner else Any) for part in value]
    wants_whole = int in _kinds(wanted) and float not in _kinds(wanted)
    if isinstance(value, float) and wants_whole and value.is_integer():
        return int(value)
    wants_real = float in _kinds(wanted) and int not in _kinds(wanted)
    if type(value) is int and wants_real:
        return float(value)  # of more than 64 bits it would overflow where it meets a tensor
    return value


def _members(wanted: Any) -> tuple[Any, ...]:
    """Returns the annotations of the members of a list; none where it is no list."""
    for kind in _kinds(wanted):
        if get_origin(kind) in LISTS:
            return get_args(kind)
    return ()


def _kinds(wanted: Any) -> tuple[Any, ...]:
    """Returns the branches of a union; the annotation itself where it is none."""
    origin = get_origin(wanted)
    if origin is Annotated:
        return _kinds(get_args(wanted)[0])
    if origin in (Union, types.UnionType):
        return tuple(kind for branch in get_args(wanted) for kind in _kinds(branch))
    return (wanted,)


def classes(wanted: Any) -> tuple[type, ...]:
    """Returns the classes that an annotation asks for, of lists those of their members."""
    kinds = [inner for kind in (*_kinds(wanted), *_members(wanted)) for inner in _kinds(kind)]
    real = [kind for kind in kinds if isinstance(kind, type) and get_origin(kind) is None]
    return tuple(
        kind for kind in real if kind not in PLAIN and not getattr(kind, "_is_protocol", False)
    )


def quoted_value(value: Any) -> str:
    """Returns a value as the command line writes it, cut after 80 characters."""
    text = _written(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{_written(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
