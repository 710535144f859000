"""Composes the settings of a command line into a Config.

Hydra composes the groups once, then the schema judges every key. All faults are collected: a
setting that cannot be used is put back to its default, so that the remaining checks still run and
the user sees everything at once.
"""

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from trainer.config import groups
from trainer.config.explain import errors_by_key, explain, list_around, unchosen, value_at
from trainer.config.groups import choices, has_choice
from trainer.config.hub import expand_hub
from trainer.config.node_checks import normalise_node
from trainer.config.overrides import sort_words
from trainer.config.own.folders import search_path
from trainer.config.own.replaced import drop_replaced
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.files.limited_reader import vet_yaml
from trainer.texts import Texts

AXES = ("context", "data")  # whose product is the number of ranks


@dataclass
class ComposedConfig:
    """The config that a command line asks for, and what is wrong with it.

    Attributes:
        config: the config; None only where nothing can be composed at all.
        faults: messages.
        given: keys and groups that were set by hand.
        mended: keys that were put back to their default because their value is at fault.
    """

    config: Config | None
    faults: list[str] = field(default_factory=list)
    given: frozenset[str] = frozenset()
    mended: frozenset[str] = frozenset()


def compose(overrides: Sequence[str]) -> ComposedConfig:
    """Composes `KEY=VALUE` settings over conf/train.yaml; faults are part of the result."""
    faults: list[str] = []
    texts = _texts(overrides)
    words = sort_words(overrides, faults, texts)
    given = frozenset(words.given)
    try:
        tree = texts.restored(_plain(words.chosen, words.values))
    except UserError as error:
        return ComposedConfig(None, [*faults, texts.restored(str(error))], given)
    try:
        return ComposedConfig(Config.model_validate(tree), faults, given)
    except ValidationError as error:
        refused = error
    mended = _mend_all(tree, refused, words.chosen, faults)
    try:
        config = Config.model_validate(tree)
    except ValidationError:
        config = None
    return ComposedConfig(config, faults, given, mended)


def sweep_words(overrides: Sequence[str], faults: list[str]) -> list[str]:
    """Returns the settings of a sweep as Hydra's sweepers take them.

    Args:
        overrides: KEY=VALUE settings; a value may be several.
        faults: receives a message for every word that cannot be read or chosen.
    """
    words = sort_words(overrides, faults, _texts(overrides), sweeps=True)
    return [*words.chosen, *words.values]


def _mend_all(
    tree: dict[str, Any], refused: ValidationError, chosen: Sequence[str], faults: list[str]
) -> frozenset[str]:
    """Puts every refused setting back to its default and appends a message about each.

    Returns:
        the keys that were put back. An unknown key has no default and is only removed.
    """
    defaults = _defaults(tuple(word for word in chosen if not word.startswith("~")))
    mended = set()
    lists_at_fault: set[str] = set()
    for key, errors in errors_by_key(refused, tree).items():
        kind = errors[0]["type"]
        if key == "mixer._target_" and kind == "missing":
            # Settings of a mixer that was not chosen; a choice that failed has its message already.
            key = "mixer"
            default = value_at(defaults, "mixer._target_")
            if not any(fault.startswith("mixer=") for fault in faults):
                faults.append(
                    f"mixer={tree['mixer']}: no mixer is chosen; write mixer=NAME as well, one of"
                    f" {', '.join(choices('mixer'))}"
                )
        elif (list_key := list_around(key)) is not None:
            faults.append(explain(key, errors, None, tree))
            lists_at_fault.add(list_key)
            continue
        else:
            default = value_at(defaults, key)
            faults.append(unchosen(key, kind, tree) or explain(key, errors, default, tree))
            if kind == "missing" and key.endswith("._target_"):
                # Settings of a class that was not named: the whole node is put back.
                key = key.removesuffix("._target_")
                default = value_at(defaults, key)
        if kind != "extra_forbidden":
            mended.add(key)
        _mend(tree, key, default)
    # Last and as a whole: the messages above show what stands in the lists.
    for list_key in lists_at_fault:
        mended.add(list_key)
        _mend(tree, list_key, value_at(defaults, list_key))
    return frozenset(mended)


def _mend(tree: Any, key: str, default: Any) -> None:
    """Sets a key of a plain config to its default; removes it where it has none."""
    *groups_above, leaf = key.split(".")
    for group in groups_above:
        tree = tree[group]
    if default is None:
        tree.pop(leaf, None)
    else:
        tree[leaf] = default


def _texts(overrides: Sequence[str]) -> Texts:
    """Returns which settings of a command line are texts, given the groups that it chooses."""
    values = {}
    chosen = []
    for word in overrides:
        key, _, value = word.lstrip("+").partition("=")
        values[key] = value
        if has_choice(key, value):
            chosen.append(groups.choice_for_hydra(f"{key}={value}"))
    return Texts(values, lambda: _defaults(tuple(chosen)))


def _defaults(chosen: tuple[str, ...]) -> dict[str, Any]:
    """Returns the settings of the chosen groups, or conf/train.yaml where they do not compose."""
    return _defaults_in(groups.folders(), chosen)


@lru_cache(maxsize=8)
def _defaults_in(folders: tuple[Path, ...], chosen: tuple[str, ...]) -> dict[str, Any]:
    try:
        return _plain(chosen)
    except UserError:
        return _plain(())


def _plain(chosen: Sequence[str], values: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the composed, resolved tree as plain data.

    Args:
        chosen: choices of groups and settings that are taken away, as Hydra takes them.
        values: ++KEY=VALUE settings.
    """
    try:
        for folder in groups.folders():
            _vet(folder)
        tree = deepcopy(_composed(groups.folders(), tuple(chosen)))
        _set_values(tree, values)
        _choose_engine(tree)
        missing = sorted(OmegaConf.missing_keys(tree))
        if missing:
            raise UserError("\n".join(f"{key} is not set; write {key}=VALUE" for key in missing))
        plain = OmegaConf.to_container(tree, resolve=True)
    except (HydraException, OmegaConfBaseException, ValueError, YAMLError, RecursionError) as error:
        one_line = " ".join(str(error).split())
        raise UserError(_reworded(one_line)) from error
    assert isinstance(plain, dict)
    plain.pop("experiment", None)
    drop_replaced(plain, [*chosen, *values], _defaults)
    expand_hub(plain, [*chosen, *values])
    for key, node in plain.items():
        # The engine is typed in Config, and its module may be slow to import.
        if key != "engine":
            normalise_node(node)
    return plain  # type: ignore[return-value]


@lru_cache(maxsize=64)
def _composed(folders: tuple[Path, ...], chosen: tuple[str, ...]) -> DictConfig:
    """Returns the tree of the chosen groups, without the values of single keys.

    Cached, because one command composes the same groups several times (for its checks, defaults
    and messages, and a sweep once a job), and Hydra takes a fifth of a second for it. The result
    is shared: copy it before it is changed.

    Args:
        folders: of configuration, Longspan's first.
        chosen: as in _plain.
    """
    with initialize_config_dir(config_dir=str(folders[0]), version_base="1.3"):
        return hydra_compose("train", [*search_path(), *chosen])


def _set_values(tree: DictConfig, values: Sequence[str]) -> None:
    """Forces ++KEY=VALUE settings into a composed tree, as Hydra would after composing it.

    Raises:
        UserError: the place is taken by a group or a single value, and does not take this one.
    """
    parser = OverridesParser.create()
    for override in parser.parse_overrides(list(values)):
        key = override.key_or_group
        try:
            OmegaConf.update(tree, key, override.value(), merge=True, force_add=True)
        except OmegaConfBaseException as error:
            word = str(override.input_line).lstrip("+")
            raise UserError(
                f"{word}: a group of settings is needed; write {key}.NAME=VALUE for each"
            ) from error


def _choose_engine(tree: DictConfig) -> None:
    """Replaces engine=auto: single for one rank, fsdp for several."""
    if OmegaConf.select(tree, "engine.name") != "auto":
        return
    context = OmegaConf.select(tree, "parallel.context")
    data = OmegaConf.select(tree, "parallel.data")
    one_rank = context in (None, 1) and data in (None, 1) and not _stages_share(tree)
    engine = "single" if one_rank else "fsdp"
    set_by_hand = {key: value for key, value in tree.engine.items() if key != "name"}
    settings = OmegaConf.load(groups.CONF / "engine" / f"{engine}.yaml")
    tree.engine = OmegaConf.merge(settings, set_by_hand)


def _stages_share(tree: DictConfig) -> bool:
    """Tells whether a stage asks for several ranks; one engine serves all stages."""
    stages = OmegaConf.to_container(tree, resolve=True).get("stages")  # pyright: ignore
    for stage in stages if isinstance(stages, list) else []:
        ranks = stage.get("parallel") if isinstance(stage, dict) else None
        if isinstance(ranks, dict) and any(ranks.get(axis) not in (None, 1) for axis in AXES):
            return True
    return False


@cache
def _vet(folder: Path) -> None:
    """Raises Unreadable for a file that Hydra cannot read or would unfold without end.

    Cached, because the files of one process do not change.
    """
    for path in sorted(folder.rglob("*.yaml")):
        vet_yaml(path)


def _reworded(message: str) -> str:
    """Returns Hydra's message in our words and with a remedy; an unknown message unchanged."""
    occupied = re.match(r"Multiple values for (\S+@\S+?)\. ", message)
    if occupied:
        return (
            f"+{occupied[1]}: there is one in that place already; write it without +,"
            f" {occupied[1]}=NAME"
        )
    absent = re.match(r"Could not override '(\S+@\S+)'", message)
    if absent:
        return f"{absent[1]}: nothing is in that place yet; write +{absent[1]}=NAME"
    apart = re.match(r"Could not override '((\S+)/(\S+))'", message)
    if apart:
        return f"{apart[1]}: its choices are those of {apart[2]}={apart[3]}; write that as well"
    unknown = re.match(r"Could not delete from config\. '(\S+?)' does not exist", message)
    if unknown:
        return f"~{unknown[1]}: no setting of that name is there to take away; leave it out"
    other = re.match(
        r"Could not delete from config\. The value of '(\S+?)' is (.*) and not", message
    )
    if other:
        return (
            f"~{other[1]}: its value is {other[2]}; write ~{other[1]} to take it away, or"
            f" {other[1]}=VALUE to change it"
        )
    return message
