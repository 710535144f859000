"""Takes the settings of a part away that another class has replaced.

`position._target_=mine.Position` stands over position=rope, whose file sets theta as well. That
theta is a default of the class that is gone: another class may not know it, or may mean another
thing by it. So of a node whose class is replaced only those settings stay that were said together
with the new class, and those that the schema gives every class of that place, as optim.betas.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from hydra.core.override_parser.overrides_parser import OverridesParser
from pydantic import BaseModel

from trainer.config import groups
from trainer.config.schema import Config
from trainer.config.values import TARGET
from trainer.errors import UserError
from trainer.files.limited_reader import yaml_file

# Its settings are those of the table in machine_schema.py, whatever class it is.
KEPT_WHOLE = ("engine",)
FORCED = "++"  # in front of the values of single keys (trainer/config/overrides.py)


def drop_replaced(
    tree: dict[Any, Any],
    overrides: Sequence[str],
    defaults: Callable[[tuple[str, ...]], Mapping[str, Any]],
) -> None:
    """Takes the defaults of every class that was replaced out of a composed tree.

    Args:
        tree: composed, plain; changed in place.
        overrides: Hydra's words that it was composed of.
        defaults: returns the tree that some choices of groups make.
    """
    values = [word for word in overrides if word.startswith(FORCED)]
    choices = [word for word in overrides if not word.startswith((FORCED, "~"))]
    said = _said_by_words(values)
    places = _places(said)
    for place in places:
        _drop(tree, place, said, defaults(tuple(choices)))
    # A recipe sets classes as well, over the groups that it or the command line chooses.
    recipes = [word for word in choices if groups.is_recipe(*word.lstrip("+").partition("=")[::2])]
    for recipe in recipes:
        in_recipe = set(_flat(_content(recipe)))
        others = tuple(word for word in choices if word != recipe)
        for place in _places(in_recipe):
            if place not in places:
                _drop(tree, place, said | in_recipe, defaults(others))


def _drop(tree: dict[Any, Any], place: str, said: Iterable[str], before: Mapping[str, Any]) -> None:
    """Takes the settings of the node in a place away that only the replaced class had."""
    node = _at(tree, place)
    replaced = _at(before, place)
    if not isinstance(node, dict) or not isinstance(replaced, Mapping):
        return
    if replaced.get(TARGET) in (None, node.get(TARGET)):
        return
    stay = {TARGET, *_typed(place)}
    for key in said:
        if key.startswith(f"{place}."):
            stay.add(key.removeprefix(f"{place}.").partition(".")[0])
    for key in set(node) - stay:
        del node[key]


def _places(keys: Iterable[str]) -> list[str]:
    """Returns the places of the classes among some keys."""
    ending = f".{TARGET}"
    places = [key.removesuffix(ending) for key in keys if key.endswith(ending)]
    return sorted(place for place in places if place not in KEPT_WHOLE)


def _typed(place: str) -> set[str]:
    """Returns the settings that the schema gives every class in a place."""
    field = Config.model_fields.get(place)
    keys: set[str] = set()
    if field is None:
        return keys
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys |= set(kind.model_fields)
    return keys


def _said_by_words(values: Sequence[str]) -> set[str]:
    """Returns the dotted keys that the words of a command line set, also within {KEY: VALUE}."""
    said: set[str] = set()
    parser = OverridesParser.create()
    for word in values:
        key, _, value = word.removeprefix(FORCED).partition("=")
        said.add(key)
        if value.startswith("{"):
            said |= {f"{key}.{inner}" for inner in _flat(parser.parse_override(word).value())}
    return said


def _content(recipe: str) -> Any:
    group, _, name = recipe.lstrip("+").partition("=")
    try:
        return yaml_file(groups.file_of(group, name))
    except (OSError, ValueError) as error:
        raise UserError(f"{recipe}: {error}") from error


def _flat(tree: Any, prefix: str = "") -> Iterable[str]:
    """Yields the dotted key of every setting of a tree, and of every group of them."""
    if not isinstance(tree, Mapping):
        return
    for name, value in tree.items():
        yield f"{prefix}{name}"
        yield from _flat(value, f"{prefix}{name}.")


def _at(tree: Any, place: str) -> Any:
    for name in place.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree
