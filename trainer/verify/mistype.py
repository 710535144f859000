"""Draws settings that a user may have mistyped, or changed without a look at the others."""

from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from trainer.config.explain import known_keys
from trainer.config.schema import Config
from trainer.verify.draw import options, settings_of

OF_PARTS = ("mixer", "position", "memory", "optim", "schedule", "objective")
GROUPS = (*OF_PARTS, "model", "data", "engine", "launch", "experiment")
UNTOUCHED = ("run_dir", "name")  # a changed directory would write outside the fuzzer's folder
# Valid values of these ask a network, or compile for minutes: only strange ones are tried.
ONLY_STRANGE = ("wandb.mode", "engine.compile")
MISUSES = (
    "=",
    "a=b=c",
    "steps",
    "steps=",
    "=3",
    "steps=3,4",
    "--steps",
    "steps = 3",
    "hydra.run.dir=/",
    "\n",
    "@x=1",
)
# The order is part of a case: inserting a value changes what every seed draws.
STRANGE = (
    *("null", "true", "false", "0", "-1", "1", "2", "3.5", "-0.0", "1e30", "1e400"),
    *("nan", "inf", "-inf", "abc", "''", "[]", "{}", "[1,2]", "[abc]", "{a:1}"),
    *("9223372036854775808", "99999999999999999999999999", "1e-30", "0.1", "none"),
    *("auto", "x" * 300, "'a b'", "/nowhere/at/all", "../..", "50%", "ünï", "'$HOME'"),
    *("1_000", "0x10", "1e3", "2024_11_27"),
)


def draw_mistakes(random: Random, base: Sequence[str]) -> list[str]:
    """Returns a run's settings with one or two changes, about half of them plausible."""
    words = list(base)
    change: Callable[[Random], list[str]] = _mistake
    if random.random() < 0.55:
        change = _plausible
    for _ in range(random.choice((1, 1, 2))):
        words += change(random)
    return words


def _plausible(random: Random) -> list[str]:
    """Draws a setting with a value of its kind, sometimes of a part that is chosen with it."""
    if random.random() < 0.45:
        group = random.choice(OF_PARTS)
        name = random.choice(options(group))
        settings = settings_of(group, name)
        words = [f"{group}={name}"]
        if settings:
            key = random.choice(sorted(settings))
            value = random.choice(_similar_values(settings[key]))
            words.append(f"{group}.{key}={value}")
        return words
    candidates = [key for key in keys() if key not in ONLY_STRANGE]
    key = random.choice(candidates)
    annotation, default = _field(key)
    value = random.choice(_valid_values(annotation, default))
    return [f"{key}={value}"]


def _valid_values(annotation: Any, default: Any) -> list[str]:
    """Returns values that a setting of this type accepts."""
    values = []
    for member in (annotation, *get_args(annotation)):
        if get_origin(member) is Literal:
            values += [str(word) for word in get_args(member)]
        elif member is type(None):
            values.append("null")
    if default is None and values:
        # The type allows None and more, but not of which kind; whole numbers are the most common.
        values += ["1", "2", "4"]
    else:
        values += _similar_values(default)
    return values


def _similar_values(value: Any) -> list[str]:
    """Returns values of the same kind as one that works."""
    # bool comes first, because it is a subclass of int.
    if isinstance(value, bool):
        return ["true", "false"]
    if isinstance(value, int):
        numbers = (value, value + 1, value * 2, value // 2, 1, 2, 3, 4)
        return [str(number) for number in numbers]
    if isinstance(value, float):
        numbers = (value, value * 2, value / 2, value / 10, 0.5, 1.0)
        return [f"{number:g}" for number in numbers]
    if isinstance(value, list | tuple):
        return ["[]", str(list(value)).replace(" ", "").replace("'", "")]
    if value is None:
        return ["null", "1", "2", "4"]
    return [value or "''"]


@cache
def keys() -> list[str]:
    """Returns the settings that may be changed."""
    return sorted(key for key in known_keys() if key not in UNTOUCHED)


def _field(key: str) -> tuple[Any, Any]:
    """Returns the type of a setting and its default; None for what the schema does not tell."""
    section: Any = Config
    field: Any = None
    for name in key.split("."):
        if not _is_model(section):
            return None, None
        field = _field_named(section, name)
        if field is None:
            return None, None
        section = field.annotation
        # An optional section is a union; the model is one of its members.
        for member in (field.annotation, *get_args(field.annotation)):
            if _is_model(member):
                section = member
                break
    default = None
    if isinstance(field.default, bool | int | float | str | list | tuple):
        default = field.default
    return field.annotation, default


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _field_named(section: type[BaseModel], name: str) -> Any:
    """Returns the field with a name or alias; None when there is none."""
    for own_name, field in section.model_fields.items():
        if name in (own_name, field.alias):
            return field
    return None


def _mistake(random: Random) -> list[str]:
    """Draws a change that is certainly a mistake."""
    kind = random.random()
    key = random.choice(keys())
    if kind < 0.55:
        return [f"{key}={random.choice(STRANGE)}"]
    if kind < 0.75:
        # A setting of a part exists only when that part is chosen, so both are given.
        group = random.choice(OF_PARTS)
        parts = [name for name in options(group) if name != "none"]
        part = random.choice(parts)
        setting = random.choice(sorted(settings_of(group, part)) or ["length"])
        return [f"{group}={part}", f"{group}.{setting}={random.choice(STRANGE)}"]
    if kind < 0.85:
        misspelled = random.choice(
            (key[:-1], key + "x", key.replace(".", ""), f"+{key}", f"~{key}", key.upper())
        )
        return [f"{misspelled}=1"]
    if kind < 0.93:
        return [f"{random.choice(GROUPS)}={random.choice(STRANGE)}"]
    return [random.choice(MISUSES)]
