"""Texts of `python -m trainer --help`: of everything, of a part (mixer=lsh --help), or of a key."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from trainer.config import groups
from trainer.config.compose import compose
from trainer.config.explain import known_keys, value_at
from trainer.config.groups import choices
from trainer.config.key_help import (
    KeyHelp,
    describe,
    files_of,
    keys_of_file,
    kind_of_annotation,
)
from trainer.config.node_checks import annotations, find_class, nearest_key, parameters
from trainer.config.schema import ComponentConfig, Config
from trainer.config.values import TARGET
from trainer.errors import UserError
from trainer.files.limited_reader import yaml_file

USAGE = """Train a sequence model on contexts longer than one device holds.

    python -m trainer [GROUP=NAME] [KEY=VALUE] ...

Examples
    python -m trainer experiment=quickstart
    python -m trainer experiment=quickstart parallel.context=4      # 4 ranks share each sequence
    python -m trainer mixer=sliding mixer.window=512 context_length=4096 batch_tokens=16384
    python -m trainer experiment=quickstart run_dir=runs/mine       # resumes when given again
    python -m trainer parallel.context=2 launch.dry_run=true        # check, start nothing
    python -m trainer -m model=full,sliding seed=1,2,3 match=parameters       # a sweep
    torchrun --nnodes 2 --nproc-per-node 8 -m trainer parallel.context=16 run_dir=/shared/run

Help
    python -m trainer mixer=lsh --help        the settings of one part
    python -m trainer --help mixer.window     one key; a group shows its members
    python -m trainer --version

Exit status
    0 done   1 failed   2 the settings cannot be honoured   3 data, disk or network failed
    143, 130, 129, 131 stopped by SIGTERM, SIGINT, SIGHUP, SIGQUIT after saving
    3 also: an evaluation is owed, which the same command does
"""
WIDTH = 34
FLAGS = ("--help", "-h")
# Offered by the run to every class that asks; they are no settings of the part.
OFFERED = (
    "width",
    "ffn",
    "layers",
    "layer",
    "heads",
    "kv_heads",
    "vocabulary",
    "max_length",
    "context_length",
    "seed",
    "position",
    "memory",
    "mixers",
    "feedforwards",
)


def text(words: Sequence[str] = ()) -> str:
    """Returns the help that a command line asks for.

    Args:
        words: of the command line; settings choose what is shown.

    Raises:
        UserError: an unknown group, member or key.
    """
    asked = [word for word in words if word not in FLAGS]
    if not asked:
        return _everything()
    settings = [word for word in asked if "=" in word]
    composed = compose(settings)
    if composed.config is None or composed.faults:
        raise UserError("\n".join(composed.faults))
    chosen = [word for word in settings if groups.is_group(word.partition("=")[0])]
    keys = [word.partition("=")[0] for word in asked if word not in chosen]
    # Where a key is asked for with --help KEY, a setting only chooses the part that it is of.
    if any("=" not in word for word in asked):
        chosen = []
        keys = [word for word in asked if "=" not in word]
    parts = [_part(composed.config, *word.partition("=")[::2]) for word in chosen]
    if chosen:
        keys = []
    return "\n\n".join([*parts, *(_key(composed.config, key) for key in keys)])


def _everything() -> str:
    config = compose([]).config
    assert config is not None, "conf/train.yaml does not compose"
    chosen = [f"    {group + '=':20}{', '.join(choices(group))}" for group in groups.groups()]
    files = files_of(groups.CONF / "train.yaml")
    return "\n".join(
        [
            USAGE,
            "Groups: GROUP=NAME",
            *chosen,
            "",
            "Keys: KEY=VALUE (default)  meaning",
            *_keys(config, "", files),
        ]
    )


def _keys(part: BaseModel, prefix: str, files: list[Path]) -> list[str]:
    lines = []
    for name in type(part).model_fields:
        value = getattr(part, name)
        if name in ("target", "mixers", "feedforwards"):
            continue
        if isinstance(value, BaseModel):
            lines += _keys(value, f"{prefix}{name}.", _files(prefix or name, files))
        else:
            lines += describe(f"{prefix}{name}", value, files, None).lines(WIDTH)[:1]
    extra = part.model_extra or {}
    for name, value in extra.items():
        if isinstance(part, ComponentConfig):
            node = {TARGET: part.target}
            lines += describe(f"{prefix}{name}", value, files, node).lines(WIDTH)[:1]
        else:
            lines += _keys(value, f"{prefix}{name}.", files)
    return lines


def _files(place: str, files: list[Path]) -> list[Path]:
    """Returns the files with comments about a part: those of all its members come last."""
    return [*files, *groups.files(place.strip("."))]


def _part(config: Config, group: str, name: str) -> str:
    """Returns the help of one member of a group: what it is, and each of its settings."""
    if name in ("", "null"):
        return _key(config, group)
    if group in groups.BY_NAME:
        names = name.strip("[]").split(",")
        return "\n\n".join(_node(config, f"{group}.{each}", each) for each in names)
    if group == "experiment":
        tree = config.model_dump(mode="json", by_alias=True)
        path = groups.file_of(group, name)
        rows = [f"experiment={name}", *_about_file(path)]
        for word in (entry.key for entry in keys_of_file(path)):
            rows += describe(word, value_at(tree, word), files_of(path), None).lines(WIDTH)
        return "\n".join(rows)
    return _node(config, group, name)


def _node(config: Config, where: str, name: str) -> str:
    group = where.partition(".")[0]
    path = groups.file_of(group, name)
    tree = config.model_dump(mode="json", by_alias=True)
    node = value_at(tree, where)
    rows = [f"{group}={name}", *_about_file(path)]
    if not isinstance(node, dict):
        return "\n".join(rows)
    files = files_of(path)
    settings = {key: value for key, value in node.items() if key != TARGET}
    entries = []
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            continue
        entries.append(describe(f"{where}.{key}", value, files, node))
    if TARGET in node:
        rows.append(f"    class {node[TARGET]}")
        entries += _further(where, node, settings)
    for entry in entries:
        rows += entry.lines(WIDTH)
    return "\n".join(rows)


def _about_file(path: Path) -> list[str]:
    """Returns the comment at the head of a yaml file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @"):
            continue
        if not line.startswith("#"):
            break
        lines.append(f"    {line.lstrip('# ')}")
    return lines


def _further(where: str, node: dict[str, Any], settings: dict[str, Any]) -> list[KeyHelp]:
    """Returns settings of the class that the yaml leaves out, with the constructor's defaults."""
    kind = find_class(node[TARGET], where)
    entries = []
    for name, parameter in parameters(kind).items():
        if name in settings or name in OFFERED:
            continue
        needed = parameter.default is inspect.Parameter.empty
        value = "must be set" if needed else parameter.default
        wanted = kind_of_annotation(annotations(kind).get(name, Any))
        if wanted or not needed:
            entries.append(describe(f"{where}.{name}", value, [], node))
    return entries


def _key(config: Config, key: str) -> str:
    """Returns the help of one key, or the members of a group and its keys.

    Raises:
        UserError: there is no such key.
    """
    group = key.partition(".")[0]
    if key in groups.groups():
        rows = [f"{key}=NAME"]
        for name in choices(key):
            about = _about_file(groups.file_of(key, name))
            rows.append(f"    {name:20}{about[0].strip() if about else ''}".rstrip())
        return "\n".join(rows)
    tree = config.model_dump(mode="json", by_alias=True)
    known = [word for word in known_keys() if not word.endswith(TARGET)]
    part = value_at(tree, key.rpartition(".")[0]) if "." in key else None
    node = part if isinstance(part, dict) and TARGET in part else None
    named = node is not None and (
        key.rpartition(".")[2] in node
        or key.rpartition(".")[2] in parameters(find_class(node[TARGET], group))
    )
    if key not in known and not named:
        remedy = nearest_key(key, known)
        if group in groups.groups():
            remedy = f"{remedy}; choose its part as well, as in {group}=NAME --help {key}"
        raise UserError(f"{key}: there is no such setting{remedy}")
    members = _members_of(group, node)
    files = [*files_of(groups.CONF / "train.yaml"), *members]
    return "\n".join(describe(key, value_at(tree, key), files, node).lines(WIDTH))


def _members_of(group: str, node: dict[str, Any] | None) -> list[Path]:
    """Returns the yaml files of a group that name the class of a node; of no node, all of them."""
    paths = groups.files(group)
    if node is None:
        return paths
    return [path for path in paths if yaml_file(path).get(TARGET) == node[TARGET]]
