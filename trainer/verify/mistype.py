"""Settings that somebody may have mistyped, or changed without thinking of the others."""

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from trainer.config.explain import known_keys
from trainer.config.schema import Config
from trainer.verify.draw import options, settings_of

OF_PARTS = ("mixer", "position", "memory", "optim", "schedule", "objective")
GROUPS = (*OF_PARTS, "model", "data", "engine", "launch", "experiment")
UNTOUCHED = ("run_dir", "name")  # or a case would write anywhere
ONLY_STRANGE = (
    "wandb.mode",
    "engine.compile",
)  # their own words ask a network, or compile for minutes
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
STRANGE = (
    "null", "true", "false", "0", "-1", "1", "2", "3.5", "-0.0", "1e30", "1e400", "nan", "inf", "-inf", "abc", "''",
    "[]", "{}", "[1,2]", "[abc]", "{a:1}", "9223372036854775808", "99999999999999999999999999", "1e-30", "0.1", "none",
    "auto", "x" * 300, "'a b'", "/nowhere/at/all", "../..", "50%", "ünï", "'$HOME'", "1_000", "0x10", "1e3",
    "2024_11_27",
)  # fmt: skip


def draw_mistakes(random: Random, base: Sequence[str]) -> list[str]:
    """A run's settings with one or two of them changed: half of the cases to something that may be
    meant."""
    words = list(base)
    change = _plausible if random.random() < 0.55 else _mistake
    for _ in range(random.choice((1, 1, 2))):
        words += change(random)
    return words


def _plausible(random: Random) -> list[str]:
    """A real setting with a value of its kind; sometimes of a part that is chosen for it."""
    if random.random() < 0.45:
        group = random.choice(OF_PARTS)
        name = random.choice(options(group))
        settings = settings_of(group, name)
        words = [f"{group}={name}"]
        if settings:
            key = random.choice(sorted(settings))
            words.append(f"{group}.{key}={random.choice(_like(settings[key]))}")
        return words
    key = random.choice([key for key in keys() if key not in ONLY_STRANGE])
    return [f"{key}={random.choice(_of(*_field(key)))}"]


def _of(annotation: Any, default: Any) -> list[str]:
    """Values that a setting of this type may have."""
    found = []
    for kind in (annotation, *get_args(annotation)):
        if get_origin(kind) is Literal:
            found += [str(word) for word in get_args(kind)]
        elif kind is type(None):
            found.append("null")
    return found + (_like(default) if default is not None or not found else ["1", "2", "4"])


def _like(value: Any) -> list[str]:
    """Values of the kind of one that works."""
    if isinstance(value, bool):
        return ["true", "false"]
    if isinstance(value, int):
        return [str(n) for n in (value, value + 1, value * 2, value // 2, 1, 2, 3, 4)]
    if isinstance(value, float):
        return [f"{n:g}" for n in (value, value * 2, value / 2, value / 10, 0.5, 1.0)]
    if isinstance(value, list | tuple):
        return ["[]", str(list(value)).replace(" ", "").replace("'", "")]
    return ["null", "1", "2", "4"] if value is None else [value or "''"]


@cache
def keys() -> list[str]:
    """Every setting that may be changed."""
    return sorted(key for key in known_keys() if key not in UNTOUCHED)


def _field(key: str) -> tuple[Any, Any]:
    """The type of a setting and the value that the usual config has."""
    kind: Any = Config
    info: Any = None
    for name in key.split("."):
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return None, None
        info = next(
            (each for own, each in kind.model_fields.items() if name in (own, each.alias)), None
        )
        if info is None:
            return None, None
        kinds = (info.annotation, *get_args(info.annotation))
        kind = next(
            (each for each in kinds if isinstance(each, type) and issubclass(each, BaseModel)),
            info.annotation,
        )
    default = (
        info.default if isinstance(info.default, bool | int | float | str | list | tuple) else None
    )
    return info.annotation, default


def _mistake(random: Random) -> list[str]:
    """What nobody may mean."""
    kind = random.random()
    key = random.choice(keys())
    if kind < 0.55:
        return [f"{key}={random.choice(STRANGE)}"]
    if kind < 0.75:  # a setting of a node, of a part that is chosen for it
        group = random.choice(OF_PARTS)
        part = random.choice([name for name in options(group) if name != "none"])
        node = random.choice(sorted(settings_of(group, part)) or ["length"])
        return [f"{group}={part}", f"{group}.{node}={random.choice(STRANGE)}"]
    if kind < 0.85:
        return [
            random.choice(
                (key[:-1], key + "x", key.replace(".", ""), f"+{key}", f"~{key}", key.upper())
            )
            + "=1"
        ]
    if kind < 0.93:
        return [f"{random.choice(GROUPS)}={random.choice(STRANGE)}"]
    return [random.choice(MISUSES)]
