"""Reads the words of a command line: which are group choices, which are values, which are wrong."""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from trainer.config import groups
from trainer.config.groups import choices, is_group, is_hydra_key
from trainer.errors import UserError
from trainer.texts import Texts, for_shell, quoted

LONGEST_KEY = 255  # the longest name of a file on the usual file systems
MULTIRUN_WORDS = ("-m", "--multirun")
MAY_BE_NULL = ("mixer", "experiment")
SWEEP_KEYS = (
    "hydra.sweep.",
    "hydra.sweeper.",
    "hydra.launcher.",
    "hydra/sweeper",
    "hydra/launcher=torchrun",
)
USAGE = "a setting is written KEY=VALUE, for example steps=100; see python -m trainer --help"


class SortedWords(NamedTuple):
    """The words of a command line that can be read.

    Attributes:
        chosen: choices of groups, and settings that are taken away.
        values: values of single keys, as Hydra is to force them in.
        given: the keys and groups that were set.
    """

    chosen: list[str]
    values: list[str]
    given: set[str]


def sort_words(
    words: Sequence[str], faults: list[str], texts: Texts, sweeps: bool = False
) -> SortedWords:
    """Parses the words of a command line and sorts them.

    Args:
        words: KEY=VALUE settings.
        faults: receives a message for every word that cannot be read or chosen.
        texts: knows which values are texts, to be quoted for Hydra.
        sweeps: whether a setting may have several values.
    """
    parser = OverridesParser.create()
    result = SortedWords([], [], set())
    for word in words:
        if word in MULTIRUN_WORDS:
            faults.append(
                f"{word}: this command takes one run's settings; sweeps are python -m trainer -m"
                " KEY=VALUE,VALUE"
            )
            continue
        try:
            spelled = _spell_for_hydra(word, texts, sweeps)
            override = parser.parse_override(spelled)
        except UserError as error:
            faults.append(str(error))
            continue
        except HydraException:
            faults.append(f"{word}: {USAGE}")
            continue
        fault = _misuse(override, word, sweeps, texts)
        if fault:
            faults.append(fault)
            continue
        _append(result, override, spelled)
    return result


def _append(result: SortedWords, override: Override, spelled: str) -> None:
    key = override.key_or_group
    result.given.add(override.package or key)
    if is_hydra_key(key) or override.package:
        result.chosen.append(spelled)
    elif groups.is_folder(key) or override.is_delete():
        result.chosen.append(groups.choice_for_hydra(spelled))
    else:
        # Forced in by ++, so that one place alone judges whether a key is known: Config and the
        # signatures of the classes. Hydra would refuse it with a message of its own.
        result.values.append("++" + spelled.lstrip("+"))


def _spell_for_hydra(word: str, texts: Texts, sweeps: bool) -> str:
    """Returns a setting as Hydra is to read it, with texts in quotes."""
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
    if name.startswith("~"):  # takes a setting away, and needs no value
        return word
    if not equals or not name:
        raise UserError(f"{word}: {USAGE}")
    if is_group(name):
        return word
    spelled = texts.swept(name, value) if sweeps else texts.spelled(name, value)
    if spelled is None:
        parts = [quoted(part.strip()) for part in value.split(",")]
        one = for_shell(f"{name}={quoted(value)}")
        several = for_shell(f"{name}={','.join(parts)}")
        raise UserError(f"{word}: one text, or several? write {one} or {several}")
    return f"{key}={spelled}"


def _misuse(override: Override, word: str, sweeps: bool, texts: Texts) -> str | None:
    """Returns the message about a word that can be read and not be used; None for a good one."""
    key = override.key_or_group
    # Hydra looks for a folder of that name, and no file system takes one so long.
    if len(key.encode("utf-8", "surrogatepass")) > LONGEST_KEY:
        return f"{word}: a key has at most {LONGEST_KEY} bytes; see python -m trainer --help"
    if is_hydra_key(key):
        return _misuse_of_hydra(word, sweeps)
    if sweeps and key == "run_dir":
        return (
            f"{word}: every job of a sweep has a directory of its own; give the folder of all with"
            " hydra.sweep.dir=PATH"
        )
    if override.is_sweep_override() and not sweeps:
        one_text = ""
        if texts.may_be_one(key):
            value = word.partition("=")[2]
            one_text = f"; one text is {for_shell(f'{key}={quoted(value)}')}"
        return (
            f"{word}: one command starts one run; for one of each value give -m as well (a list is"
            f" [a,b]{one_text})"
        )
    chooses = groups.is_folder(key) and not override.is_delete() and not override.package
    if chooses:
        return _misuse_of_group(override, word)
    return None


def _misuse_of_hydra(word: str, sweeps: bool) -> str | None:
    if not sweeps:
        return (
            f"{word}: Hydra only composes here and has no say in the run; its directory is"
            " run_dir=PATH"
        )
    if not word.lstrip("+~").startswith(SWEEP_KEYS):
        return (
            f"{word}: of Hydra's settings a sweep takes those of {', '.join(SWEEP_KEYS)}, and no"
            " other"
        )
    return None


def _misuse_of_group(override: Override, word: str) -> str | None:
    """Returns the message about GROUP=NAME where the group has no such name."""
    group = override.key_or_group
    value = override.value()
    is_list = isinstance(value, list) and not override.is_sweep_override()
    if is_list and group not in groups.BY_NAME:
        hint = ""
        if group == "mixer":
            hint = "; layers of several kinds are model.pattern=[A,B], as in model=hybrid"
        return f"{word}: choose one {group}, not a list{hint}"
    if value == [] and group == "evaluation":
        return f"{word}: the list is empty; name some, or write evaluation.every=0"
    if value is None and group not in MAY_BE_NULL:
        none = "; [] is none" if group == "logger" else ""
        return f"{word}: one has to be chosen; known: {', '.join(choices(group))}{none}"
    if not override.is_sweep_override():
        choices_made = [value]
    elif override.is_discrete_sweep():
        choices_made = list(override.sweep_iterator())
    else:
        choices_made = []
    names = []
    for choice in choices_made:
        names += choice if isinstance(choice, list) else [choice]
    for name in names:
        if name is None or groups.has_choice(group, name):
            continue
        known = choices(group)
        close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f"did you mean {group}={close[0]}? " if close else ""
        return f"{word}: there is no {group} of that name; {hint}known: {', '.join(known)}"
    return None
