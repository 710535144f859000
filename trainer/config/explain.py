"""Messages about settings that the schema refuses: the fact and the nearest existing setting."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from trainer.config.finding import Finding, render
from trainer.config.groups import BY_NAME, choices, is_group
from trainer.config.node_checks import ALIKE, nearest_key
from trainer.config.renamed import new_key, new_value
from trainer.config.schema import ComponentConfig, Config, OptimGroup
from trainer.config.stage_schema import StageConfig
from trainer.config.values import quoted_value

# By kind of error of pydantic; a kind such as int_parsing counts as int.
FACTS = {
    "int": "a whole number is needed",
    "float": "a number is needed",
    "finite_number": "a finite number is needed",
    "bool": "true or false is needed",
    "string": "a text is needed (in a YAML file in quotes)",
    "list": "a list is needed, as [a,b]",
    "tuple": "a list of two is needed, as [a,b]",
    "too_short": "it is empty",
    "dict": "a group of settings is needed",
    "model": "a group of settings is needed",
}
BOUNDS = {
    "greater_than_equal": "at least",
    "greater_than": "more than",
    "less_than_equal": "at most",
    "less_than": "less than",
}


# Lists whose members are groups of settings, with the model of a member.
LISTED: dict[str, type[BaseModel]] = {"stages": StageConfig, "optim.groups": OptimGroup}


def list_around(key: str) -> str | None:
    """Returns the list of groups that a key lies in, or is; None elsewhere."""
    for list_key in LISTED:
        if key == list_key or key.startswith(f"{list_key}."):
            return list_key
    return None


def errors_by_key(error: ValidationError, tree: Any) -> dict[str, list[Any]]:
    """Groups the errors of a validation by the dotted key that each concerns.

    Args:
        error: what pydantic raised.
        tree: the plain config that it was raised for.
    """
    errors: dict[str, list[Any]] = {}
    for detail in error.errors(include_url=False):
        path = []
        subtree = tree
        for part in detail["loc"]:
            # The location also names the branches of unions, which are no keys of the config.
            if isinstance(subtree, dict) and (part in subtree or detail["type"] == "missing"):
                path.append(str(part))
                subtree = subtree.get(part)
            elif isinstance(part, int) and isinstance(subtree, list) and ".".join(path) in LISTED:
                path.append(str(part))
                subtree = subtree[part]
            elif isinstance(part, int) and detail["type"] == "missing":
                # A place of a list that has too few members.
                detail["type"] = "tuple"
        is_named = len(path) == 2 and path[0] in BY_NAME
        if is_named and detail["type"].startswith(("model_", "dict_")):
            # Every unknown key of this group is taken for a node, and a plain value is none.
            detail["type"] = "extra_forbidden"
        errors.setdefault(".".join(path), []).append(detail)
    return errors


def unchosen(key: str, kind: str, tree: Any) -> str | None:
    """Returns the message about settings of a named part that was not chosen; None otherwise.

    Args:
        key: the dotted key that is at fault.
        kind: pydantic's name of the error.
        tree: the plain config that was refused.
    """
    group, *inner = key.split(".")
    if group not in BY_NAME or kind != "missing" or inner[1:] != ["_target_"]:
        return None
    name = inner[0]
    setting, value = next(iter(tree[group][name].items()), ("KEY", "VALUE"))
    usual = "heldout" if group == "evaluation" else "wandb"
    stated = f"{group}.{name}.{setting}={quoted_value(value)}"
    known = choices(group)
    if name in known:
        remedy = f"write {group}=[{usual},{name}] as well"
    else:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {group}.{near[0]}? " if near else ""
        remedy = f"{hint}known: {', '.join(known)}; a class of your own is named by _target_"
    return f"{stated}: no {group} {name} is chosen; {remedy}"


def explain(key: str, errors: list[Any], default: Any, tree: Any) -> str:
    """Returns the message about one key.

    Args:
        key: the dotted key.
        errors: pydantic's errors about it.
        default: the value that the chosen groups give it; None where they give none.
        tree: the plain config that was refused.
    """
    value = value_at(tree, key)
    kind = errors[0]["type"]
    if kind == "extra_forbidden":
        # Of an unknown group the setting is named that was written into it.
        while isinstance(value, dict) and value:
            inner_key, value = next(iter(value.items()))
            key = f"{key}.{inner_key}"
        return f"{key}={quoted_value(value)}: there is no such setting{_nearest_key(key)}"
    example = ""
    if default is not None and not isinstance(default, dict):
        example = f"for example {key}={quoted_value(default)}"
    if kind == "missing":
        return f"{key} is not set; {example or f'write {key}=VALUE'}"
    renamed = new_value(key, value)
    if renamed is not None:
        return f"{key}={value}: this value is called {renamed} now; use {key}={renamed}"
    facts = dict.fromkeys(_fact(error) for error in errors)
    return render(Finding(key, value, " or ".join(facts), example))


def value_at(tree: Any, key: str) -> Any:
    """Returns what stands at a dotted key of a plain config; None where nothing does."""
    for part in key.split("."):
        if isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
            continue
        if not isinstance(tree, dict):
            return None
        tree = tree.get(part)
    return tree


def _fact(error: Any) -> str:
    kind = error["type"]
    context = error.get("ctx", {})
    if kind == "literal_error":
        return f"choose {context['expected']}"
    if kind in BOUNDS:
        bound = next(iter(context.values()))
        return f"it must be {BOUNDS[kind]} {bound}"
    if kind == "string_pattern_mismatch":
        return "letters, digits and . _ = , + - only, and no blank or slash"
    for name, fact in FACTS.items():
        if kind == name or kind.startswith(f"{name}_"):
            return fact
    return error["msg"].removeprefix("Value error, ")


def known_keys(part: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Yields every dotted key that Config knows, without the settings of nodes.

    Args:
        part: the model to walk through.
        prefix: the key of that model in the config, with a dot behind it.
    """
    for name, field in part.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        yield key
        # Keys of a member are named like others and have a message of their own.
        if key in LISTED:
            continue
        for kind in (field.annotation, *get_args(field.annotation)):
            if not isinstance(kind, type) or not issubclass(kind, BaseModel):
                continue
            if kind is not ComponentConfig:
                yield from known_keys(kind, f"{key}.")


def _nearest_key(key: str) -> str:
    """Returns '; did you mean X?' for an unknown key, or the keys of its group.

    A key of another meaning is never proposed: it must be the same but for its spelling or for a
    group that was left out.
    """
    list_key = list_around(key)
    if list_key is not None and key != list_key:
        place = key.removeprefix(f"{list_key}.").partition(".")[0]
        own = known_keys(LISTED[list_key], f"{list_key}.{place}.")
        return nearest_key(key, _members(own, key.rpartition(".")[0]))
    known = [name for name in known_keys() if not name.endswith("_target_")]
    renamed = new_key(key, known)
    if renamed is not None:
        return f"; it is called {renamed} now"
    without_group = [name for name in known if name.endswith(f".{key}")]
    if without_group:
        return f"; did you mean {' or '.join(without_group)}?"
    leaf = key.rpartition(".")[2]
    settings = [name for name in known if not is_group(name)]
    group = key.partition(".")[0]
    if leaf in settings and not any(name.startswith(f"{group}.") for name in known):
        return f"; did you mean {leaf}?"
    in_other_groups = [name for name in settings if name.rpartition(".")[2] == leaf]
    if len(in_other_groups) == 1:
        return f"; did you mean {in_other_groups[0]}?"
    alike = [name for name in known if _is_alike(name, key)]
    if alike:
        nearest = difflib.get_close_matches(key, alike, n=1, cutoff=0)[0]
        return f"; did you mean {nearest}?"
    group = key.rpartition(".")[0]
    return nearest_key(key, _members(known, group))


def _members(known: Iterable[str], group: str) -> list[str]:
    return [name for name in known if name.rpartition(".")[0] == group]


def _is_alike(known: str, key: str) -> bool:
    """Tells whether two keys are the same but for the spelling of each word."""
    known_words = known.split(".")
    words = key.split(".")
    if len(known_words) != len(words):
        return False
    for known_word, word in zip(known_words, words):
        if difflib.SequenceMatcher(None, known_word, word).ratio() < ALIKE:
            return False
    return True
