"""Record of one fault that a check finds in a config, and the sentence that reports it."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from trainer.config.values import quoted_value

SETTING = re.compile(r"(?<![\w.])([a-z_][\w.]*)=")
FIRST_KEY = re.compile(r"[a-z_][\w.]*")
NO_VALUE_SHOWN = object()


@dataclass(frozen=True)
class Finding:
    """A setting that cannot be honoured.

    Attributes:
        key: the dotted key of the setting; empty where a finished sentence is given instead.
        value: the value that was set; NO_VALUE_SHOWN where the key alone says enough.
        fact: the reason why the value cannot be honoured.
        remedy: settings that would be accepted.
        causes: further keys that the fact depends on.
        sentence: the whole report, where it was written by a part that knows no findings (a
            constructor, an engine).
    """

    key: str = ""
    value: Any = NO_VALUE_SHOWN
    fact: str = ""
    remedy: str = ""
    causes: tuple[str, ...] = ()
    sentence: str = ""

    def depends_on(self, keys: Collection[str]) -> bool:
        """Tells whether the fault concerns one of these keys, or a setting inside one of them."""
        for own_key in self._keys():
            for key in keys:
                if own_key == key or own_key.startswith(f"{key}."):
                    return True
        return False

    def _keys(self) -> tuple[str, ...]:
        if self.key:
            return (self.key, *self.causes)
        # A remedy names settings that are not at fault: only the fact in front of it is read.
        stated_fact = self.sentence.partition("; ")[0]
        keys = SETTING.findall(stated_fact)
        first_key = FIRST_KEY.match(stated_fact)
        if first_key:
            keys.append(first_key[0])
        return tuple(keys)


def as_finding(fault: Finding | str) -> Finding:
    """Returns a finding as it is, and wraps a finished sentence in one."""
    if isinstance(fault, Finding):
        return fault
    return Finding(sentence=fault)


def render(finding: Finding) -> str:
    """Returns the message `key=value: fact; remedy` of a finding."""
    if finding.sentence:
        return finding.sentence
    setting = finding.key
    if finding.value is not NO_VALUE_SHOWN:
        setting = f"{setting}={quoted_value(finding.value)}"
    message = f"{setting}: {finding.fact}"
    if finding.remedy:
        message = f"{message}; {finding.remedy}"
    return message
