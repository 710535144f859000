"""Completion of the command `longspan` in bash, zsh and fish.

    eval "$(longspan --completion bash)"      # in ~/.bashrc
    eval "$(longspan --completion zsh)"       # in ~/.zshrc, after compinit
    longspan --completion fish | source       # in ~/.config/fish/config.fish

The shell asks `longspan --complete WORD` at every press of the key, so nothing of torch, Hydra or
the schema is imported here: keys are those that the yaml files of conf/ set. Hydra's own completion
needs an application of hydra.main, which no command here is.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from trainer.config.groups import CONF, choices, files, groups

SHELLS = ("bash", "zsh", "fish")
COMPLETE = "--complete"
COMPLETION = "--completion"
OPTIONS = ("--help", "--version", "--multirun", COMPLETION)
SCRIPTS = {
    "bash": """_longspan() {
    local line="${COMP_LINE:0:COMP_POINT}"
    local word="${line##* }"
    local shown="${word%"${word##*[=:]}"}"
    local IFS=$'\\n'
    COMPREPLY=($(longspan --complete "$word"))
    COMPREPLY=("${COMPREPLY[@]#"$shown"}")
}
complete -o nospace -F _longspan longspan""",
    "zsh": """_longspan() {
    local -a replies
    replies=("${(@f)$(longspan --complete "${words[CURRENT]}")}")
    compadd -S '' -- $replies
}
compdef _longspan longspan""",
    "fish": "complete -c longspan -f -a '(longspan --complete (commandline -ct))'",
}


def run(words: Sequence[str]) -> int | None:
    """Answers a shell; returns the exit status, or None where the words ask for something else."""
    first = words[0] if words else ""
    if first == COMPLETE:
        print("\n".join(candidates(words[1] if len(words) > 1 else "")))
        return 0
    if first != COMPLETION:
        return None
    shell = words[1] if len(words) > 1 else ""
    if shell not in SCRIPTS:
        print(
            f"{COMPLETION} {shell}: no such shell; choose one of {', '.join(SHELLS)}",
            file=sys.stderr,
        )
        return 2
    print(SCRIPTS[shell])
    return 0


def candidates(word: str) -> list[str]:
    """Returns the words that may be meant by the beginning of one: groups, members and keys."""
    key, equals, value = word.partition("=")
    if equals and key.lstrip("+") in groups():
        return [f"{key}={name}" for name in choices(key.lstrip("+")) if name.startswith(value)]
    if equals:
        return []
    if word.startswith("-"):
        return [option for option in OPTIONS if option.startswith(word)]
    known = {f"{group}=" for group in groups()} | {f"{name}=" for name in keys(word)}
    return sorted(name for name in known if name.startswith(word))


def keys(word: str) -> Iterator[str]:
    """Yields the keys of conf/train.yaml, and those of the groups that a word may belong to."""
    yield from _leaves(_tree(CONF / "train.yaml"), "")
    for group in groups():
        if not word.startswith(f"{group}.") or group == "experiment":
            continue
        for path in files(group):
            yield from _leaves(_tree(path), f"{group}.")


def _tree(path: Any) -> Mapping[str, Any]:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    return tree if isinstance(tree, Mapping) else {}


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in tree.items():
        if name in ("defaults", "hydra") or re.fullmatch(r"\w+@.*|_\w+_", str(name)):
            continue
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
