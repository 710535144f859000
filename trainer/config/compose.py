"""From the command line to a Config: Hydra composes the groups once, the model of the knobs judges
every key.

All faults are collected. A setting that cannot be used is put back to its default, so that the
remaining checks still run and the user sees everything at once.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, get_args

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from trainer.config.node_checks import ALIKE, nearest_key, normalise_node
from trainer.config.renamed import new_key, new_value
from trainer.config.schema import ComponentConfig, Config
from trainer.config.values import quoted_value
from trainer.errors import UserError
from trainer.limited_reader import vet_yaml
from trainer.texts import Texts, for_shell, quoted

CONF = Path(__file__).resolve().parent.parent.parent / "conf"
MANY = ("-m", "--multirun")
MAY_BE_NULL = ("mixer", "experiment")
OF_SWEEPS = (
    "hydra.sweep.",
    "hydra.sweeper.",
    "hydra.launcher.",
    "hydra/sweeper",
    "hydra/launcher=torchrun",
)
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


@dataclass
class ComposedConfig:
    """What the command line asked for."""

    config: Config | None
    faults: list[str] = field(default_factory=list)
    given: frozenset[str] = frozenset()  # keys and groups that were set by hand
    mended: frozenset[str] = (
        frozenset()
    )  # keys put back to their default, because their value is a fault


def choices(group: str) -> list[str]:
    """The names of a group, as in mixer=NAME."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def groups() -> list[str]:
    """The groups that can be chosen, as in NAME=..."""
    return sorted(
        path.name for path in CONF.iterdir() if path.is_dir() and any(path.glob("*.yaml"))
    )


def compose(overrides: Sequence[str]) -> ComposedConfig:
    """Compose `KEY=VALUE` settings over conf/train.yaml.

    Returns:
        A Wish; its config is None only where nothing can be composed at all.
    """
    faults: list[str] = []
    texts = _texts(overrides)
    chosen, values, given = _sort(overrides, faults, texts)
    try:
        tree = texts.restored(_plain([*chosen, *values]))
    except UserError as fault:
        return ComposedConfig(None, [*faults, texts.restored(str(fault))], frozenset(given))
    try:
        return ComposedConfig(Config.model_validate(tree), faults, frozenset(given))
    except ValidationError as error:
        wrong = error
    defaults = _defaults(tuple(word for word in chosen if not word.startswith("~")))
    mended = set()
    for key, errors in _by_key(wrong, tree).items():
        usual = _at(defaults, key)
        if key == "mixer._target_":  # settings of a mixer that nobody chose
            key = "mixer"
            if not any(fault.startswith("mixer=") for fault in faults):
                names = ", ".join(choices("mixer"))
                faults.append(
                    f"mixer={tree['mixer']}: no mixer is chosen; write mixer=NAME as well, one of"
                    f" {names}"
                )
        else:
            faults.append(_explain(key, errors, usual, tree))
            if errors[0]["type"] == "missing" and key.endswith(
                "._target_"
            ):  # settings of a class that nobody named
                key = key.removesuffix("._target_")
                usual = _at(defaults, key)
        if errors[0]["type"] != "extra_forbidden":
            mended.add(key)
        _mend(tree, key, usual)
    try:
        config = Config.model_validate(tree)
    except ValidationError:
        config = None
    return ComposedConfig(config, faults, frozenset(given), frozenset(mended))


def sweep_words(overrides: Sequence[str], faults: list[str]) -> list[str]:
    """The settings of a sweep as Hydra's sweepers take them; what cannot be read or chosen becomes
    a fault."""
    chosen, values, _ = _sort(overrides, faults, _texts(overrides), sweeps=True)
    return [*chosen, *values]


def _texts(overrides: Sequence[str]) -> Texts:
    """What of a command line is text, in the light of the groups that it chooses."""
    words = [word.lstrip("+").partition("=") for word in overrides]
    chosen = tuple(
        f"{key}={value}"
        for key, _, value in words
        if _is_group(key) and (CONF / key / f"{value}.yaml").is_file()
    )
    return Texts({key: value for key, _, value in words}, lambda: _defaults(chosen))


def _is_group(key: str) -> bool:
    return bool(key) and not _is_hydra(key) and (CONF / key.partition("@")[0]).is_dir()


def _spelled(text: str, texts: Texts, sweeps: bool) -> str:
    """A setting as Hydra is to read it; Fault where it cannot be read at all."""
    key, equals, raw = text.partition("=")
    name = key.lstrip("+")
    if name.startswith("~"):  # takes a setting away, and needs no value
        return text
    if not equals or not name:
        raise UserError(
            f"{text}: a setting is written KEY=VALUE, for example steps=100; see python -m trainer"
            " --help"
        )
    if _is_group(name):
        return text
    value = texts.swept(name, raw) if sweeps else texts.spelled(name, raw)
    if value is None:
        one = for_shell(f"{name}={quoted(raw)}")
        many = for_shell(f"{name}={','.join(quoted(part.strip()) for part in raw.split(','))}")
        raise UserError(f"{text}: one text, or several? write {one} or {many}")
    return f"{key}={value}"


def _sort(
    overrides: Sequence[str], faults: list[str], texts: Texts, sweeps: bool = False
) -> tuple[list[str], list[str], set[str]]:
    """Group choices, values and the keys that were given; what cannot be read becomes a fault."""
    parser = OverridesParser.create()
    chosen = []
    values = []
    given = set()
    for text in overrides:
        if text in MANY:
            faults.append(
                f"{text}: this command takes one run's settings; sweeps are python -m trainer -m"
                " KEY=VALUE,VALUE"
            )
            continue
        typed = text
        try:
            text = _spelled(typed, texts, sweeps)
            override = parser.parse_override(text)
        except UserError as fault:
            faults.append(str(fault))
            continue
        except HydraException:
            faults.append(
                f"{typed}: a setting is written KEY=VALUE, for example steps=100; see python -m"
                " trainer --help"
            )
            continue
        fault = _misuse(override, typed, sweeps, texts)
        if fault:
            faults.append(fault)
            continue
        key = override.key_or_group
        given.add(override.package if override.package else key)
        if _is_hydra(key) or override.package:
            chosen.append(text)
        elif (CONF / key).is_dir() or override.is_delete():
            chosen.append(text.lstrip("+"))
        else:
            # forced in here: whether a key is known is judged by Config and by the signatures, in
            # one place
            values.append("++" + text.lstrip("+"))
    return chosen, values, given


def _is_hydra(key: str) -> bool:
    return key.startswith(("hydra.", "hydra/")) or key == "hydra"


def _misuse(override: Override, text: str, sweeps: bool, texts: Texts) -> str | None:
    key = override.key_or_group
    value = override.value()
    raw = text.partition("=")[2]
    if _is_hydra(key):
        if not sweeps:
            return (
                f"{text}: Hydra only composes here and has no say in the run; its directory is"
                " run_dir=PATH"
            )
        if not text.lstrip("+~").startswith(OF_SWEEPS):
            return (
                f"{text}: of Hydra's settings a sweep takes those of {', '.join(OF_SWEEPS)}, and no"
                " other"
            )
        return None
    if sweeps and key == "run_dir":
        return (
            f"{text}: every job of a sweep has a directory of its own; give the folder of all with"
            " hydra.sweep.dir=PATH"
        )
    if override.is_sweep_override() and not sweeps:
        one = f"; one text is {for_shell(f'{key}={quoted(raw)}')}" if texts.may_be_one(key) else ""
        return (
            f"{text}: one command starts one run; for one of each value give -m as well (a list is"
            f" [a,b]{one})"
        )
    if not (CONF / key).is_dir() or override.is_delete() or override.package:
        return None
    if isinstance(value, list) and not override.is_sweep_override():
        several = (
            "; layers of several kinds are model.pattern=[A,B], as in model=hybrid"
            if key == "mixer"
            else ""
        )
        return f"{text}: choose one {key}, not a list{several}"
    if value is None and key not in MAY_BE_NULL:
        return f"{text}: one has to be chosen; known: {', '.join(choices(key))}"
    wanted = [value]
    if override.is_sweep_override():
        wanted = list(override.sweep_iterator()) if override.is_discrete_sweep() else []
    for each in wanted:
        if each is not None and not (CONF / key / f"{each}.yaml").is_file():
            known = choices(key)
            close = difflib.get_close_matches(str(each), known, n=1, cutoff=0.5)
            hint = f"did you mean {key}={close[0]}? " if close else ""
            return f"{text}: there is no {key} of that name; {hint}known: {', '.join(known)}"
    return None


@lru_cache(maxsize=8)
def _defaults(chosen: tuple[str, ...]) -> dict[str, Any]:
    """What the groups that were chosen say, for examples in messages; conf/train.yaml alone where
    they do not compose."""
    try:
        return _plain(list(chosen))
    except UserError:
        return _plain([])


def _plain(overrides: list[str]) -> dict[str, Any]:
    """The composed, resolved tree as plain data; `engine=auto` is decided by the number of
    ranks."""
    try:
        _vet(CONF)
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            tree = hydra_compose("train", overrides)
        if OmegaConf.select(tree, "engine.name") == "auto":
            ranks = [OmegaConf.select(tree, f"parallel.{key}") for key in ("context", "data")]
            engine = "single" if all(rank in (None, 1) for rank in ranks) else "fsdp"
            set_by_hand = {key: value for key, value in tree.engine.items() if key != "name"}
            tree.engine = OmegaConf.merge(
                OmegaConf.load(CONF / "engine" / f"{engine}.yaml"), set_by_hand
            )
        if missing := OmegaConf.missing_keys(tree):
            raise UserError(
                "\n".join(f"{key} is not set; write {key}=VALUE" for key in sorted(missing))
            )
        plain = OmegaConf.to_container(tree, resolve=True)
    except (HydraException, OmegaConfBaseException, ValueError, YAMLError, RecursionError) as error:
        raise UserError(_plainly(" ".join(str(error).split()))) from error
    assert isinstance(plain, dict)
    plain.pop("experiment", None)
    for key, node in plain.items():
        if key != "engine":  # typed in Config; its module may be slow to import
            normalise_node(node)
    return plain  # type: ignore[return-value]


@cache
def _vet(folder: Path) -> None:
    """Raise Unreadable for a settings file that Hydra could not read, or would unfold without end;
    once in a process."""
    for path in sorted(folder.rglob("*.yaml")):
        vet_yaml(path)


def _plainly(said: str) -> str:
    """Hydra's word of a group that is put into a place, as GROUP@PLACE=NAME, with the way that
    works."""
    if there := re.match(r"Multiple values for (\S+@\S+?)\. ", said):
        return (
            f"+{there[1]}: there is one in that place already; write it without +, {there[1]}=NAME"
        )
    if unlike := re.match(r"Error merging override \++((\S+?)=.*)$", said):
        return f"{unlike[1]}: a group of settings is needed; write {unlike[2]}.NAME=VALUE for each"
    if absent := re.match(r"Could not override '(\S+@\S+)'", said):
        return f"{absent[1]}: nothing is in that place yet; write +{absent[1]}=NAME"
    return said


def _by_key(error: ValidationError, tree: Any) -> dict[str, list[Any]]:
    """The errors of each key; the branches of a union fall together under their key."""
    found: dict[str, list[Any]] = {}
    for each in error.errors(include_url=False):
        path = []
        here = tree
        for part in each["loc"]:
            if isinstance(here, dict) and (part in here or each["type"] == "missing"):
                path.append(str(part))
                here = here.get(part)
            elif isinstance(part, int):
                each["type"] = "tuple" if each["type"] == "missing" else each["type"]
        found.setdefault(".".join(path), []).append(each)
    return found


def _explain(key: str, errors: list[Any], usual: Any, tree: Any) -> str:
    value = _at(tree, key)
    kind = errors[0]["type"]
    if kind == "extra_forbidden":
        while isinstance(value, dict) and value:  # an unknown group: name what was written of it
            inner, value = next(iter(value.items()))
            key = f"{key}.{inner}"
        return f"{key}={quoted_value(value)}: there is no such setting{_nearest_key(key)}"
    example = (
        ""
        if usual is None or isinstance(usual, dict)
        else f"; for example {key}={quoted_value(usual)}"
    )
    if kind == "missing":
        return f"{key} is not set{example or f'; write {key}=VALUE'}"
    if (renamed := new_value(key, value)) is not None:
        return f"{key}={value}: this value is called {renamed} now; use {key}={renamed}"
    facts = dict.fromkeys(_fact(error) for error in errors)
    return f"{key}={quoted_value(value)}: {' or '.join(facts)}{example}"


def _fact(error: Any) -> str:
    kind = error["type"]
    told = error.get("ctx", {})
    if kind == "literal_error":
        return f"choose {told['expected']}"
    bounds = {
        "greater_than_equal": "at least",
        "greater_than": "more than",
        "less_than_equal": "at most",
    }
    for name, words in {**bounds, "less_than": "less than"}.items():
        if kind == name:
            return f"it must be {words} {next(iter(told.values()))}"
    if kind == "string_pattern_mismatch":
        return "letters, digits and . _ = , + - only, and no blank or slash"
    for name, words in FACTS.items():
        if kind == name or kind.startswith(f"{name}_"):
            return words
    return error["msg"].removeprefix("Value error, ")


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _mend(tree: Any, key: str, usual: Any) -> None:
    *road, last = key.split(".")
    for part in road:
        tree = tree[part]
    if usual is None:
        tree.pop(last, None)
    else:
        tree[last] = usual


def known_keys(part: type[BaseModel] = Config, prefix: str = "") -> Iterable[str]:
    """Every dotted key that Config knows, nodes' own settings left out."""
    for name, info in part.model_fields.items():
        key = f"{prefix}{info.alias or name}"
        yield key
        for kind in (info.annotation, *get_args(info.annotation)):
            if (
                isinstance(kind, type)
                and issubclass(kind, BaseModel)
                and kind is not ComponentConfig
            ):
                yield from known_keys(kind, f"{key}.")


def _nearest_key(key: str) -> str:
    """A known key for one that is misspelled, or that lacks its group; never one of another
    meaning, else what there is."""
    known = [each for each in known_keys() if not each.endswith("_target_")]
    if (renamed := new_key(key, known)) is not None:
        return f"; it is called {renamed} now"
    leaf = key.rpartition(".")[2]
    if lacking := [each for each in known if each.endswith(f".{key}")]:
        return f"; did you mean {' or '.join(lacking)}?"
    homes = [each for each in known if each.rpartition(".")[2] == leaf]
    if len(homes) == 1:  # the only setting of that name, written into another group
        return f"; did you mean {homes[0]}?"
    alike = [each for each in known if _is_alike(each, key)]
    if alike:
        return f"; did you mean {difflib.get_close_matches(key, alike, n=1, cutoff=0)[0]}?"
    return nearest_key(
        key, [each for each in known if each.rpartition(".")[0] == key.rpartition(".")[0]]
    )


def _is_alike(known: str, key: str) -> bool:
    """Whether two keys are the same but for spelling, word by word."""
    words = list(zip(known.split("."), key.split(".")))
    same_depth = known.count(".") == key.count(".")
    return same_depth and all(
        difflib.SequenceMatcher(None, a, b).ratio() >= ALIKE for a, b in words
    )
