"""Secrets of a config or a command, hidden before anything of it is shown, sent or published.

Three signs give a secret away: the name of its key, a place in a text where secrets stand (`KEY=...`, `--password ...`, the
user of an address, the parameters of an address, a header), and a shape that only keys of well-known services have. All
readers use these functions, so that what is hidden in one place is hidden in all.
"""

import re
from typing import Any

HIDDEN = "***"
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
ALWAYS = frozenset(
    "password passwd passphrase pwd secret secrets credential credentials authorization apikey apikeys accesskey "
    "privatekey secretkey authtoken accesstoken bearer pat".split()
)
# A key alone sorts or looks up; with one of these before it, it opens something.
KEY_OF = frozenset("api access secret private auth signing signature encryption storage account ssh license service deploy".split())
TOKEN_OF_TEXT = frozenset("bos eos pad unk mask sep cls special start end stop next first last any each per of".split())
IN_QUERY = frozenset("sig signature key code credential".split())

IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")
QUERY = re.compile(r"(?P<before>[?&;](?P<key>[\w.%-]+)=)(?P<value>[^&;#\s'\"]+)")
QUOTED = r"\"[^\"]*\"|'[^']*'"
ASSIGNED = re.compile(
    rf"(?P<before>(?<![\w.-])(?P<key>[A-Za-z_][\w.-]*)[\"']?\s*(?:=|:(?!//))\s*)(?P<value>{QUOTED}|[^\s&;,|'\"}}\])]+)"
)
OPTION = re.compile(rf"(?P<before>(?<!\S)--?(?P<key>[A-Za-z][\w-]*)\s+)(?P<value>{QUOTED}|[^\s;|&-]\S*)")
HEADER = re.compile(r"(?P<before>\b(?:Bearer|Basic|Digest|Negotiate)\s+)(?P<value>[\w.~+/=-]{6,})", re.I)
LOGIN = re.compile(r"(?P<before>\b(?:login\s+(?:--\S+\s+)*|(?:-u|--user)[\s=]+[^\s:=]+:|sshpass\s+-p\s*))(?P<value>[^\s;|&-]\S*)")
SHAPE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abeoprs]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|ya29\.[\w-]{16,}|npm_[A-Za-z0-9]{30,}"
    r"|pypi-[\w-]{16,}|dckr_pat_[\w-]{16,}|wandb_v\d+_\w{16,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
BLOCK = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S)


def secret_key(key: str) -> bool:
    """Whether the name of a key, or of a variable, says that its value is a secret."""
    words = [word.lower() for word in re.split(r"[\W_]+", CAMEL.sub("_", key)) if word]
    if any(word in ALWAYS for word in words):
        return True
    for before, word in zip(["", *words], words):
        if word in ("key", "keys") and before in KEY_OF:
            return True
    if not words or words[-1] not in ("token", "tokens"):
        return False
    if words[-1] == "tokens":  # counts of tokens are everywhere; several secrets are rare and say what they open
        return words[-2:-1] and words[-2] in KEY_OF
    return len(words) < 2 or words[-2] not in TOKEN_OF_TEXT


def redacted(text: str) -> str:
    """A text fit to be shown."""
    text = BLOCK.sub(HIDDEN, text)
    text = IN_ADDRESS.sub(f"{HIDDEN}@", text)
    text = HEADER.sub(_hide, text)
    text = QUERY.sub(lambda match: _hide_if(match, match["key"].lower() in IN_QUERY), text)
    text = ASSIGNED.sub(_hide_if, text)
    text = OPTION.sub(_hide_if, text)
    text = LOGIN.sub(_hide, text)
    return SHAPE.sub(HIDDEN, text)


def _hide(match: re.Match[str]) -> str:
    return f"{match['before']}{HIDDEN}"


def _hide_if(match: re.Match[str], certain: bool = False) -> str:
    """The value hidden where its key says so; `Authorization: Bearer ***` is hidden already and stays readable."""
    if not (certain or secret_key(match["key"])):
        return match[0]
    return match[0] if HEADER_NAME.fullmatch(match["value"]) else _hide(match)


HEADER_NAME = re.compile(r"Bearer|Basic|Digest|Negotiate", re.I)


def without_secrets(value: Any) -> Any:
    """A config fit to be shown: every secret in it becomes ***."""
    if isinstance(value, dict):
        hidden = {key for key, item in value.items() if secret_key(str(key)) and item is not None}
        return {key: HIDDEN if key in hidden else without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return _words_without_secrets(value)
    return redacted(value) if isinstance(value, str) else value


def _words_without_secrets(items: list[Any] | tuple[Any, ...]) -> list[Any]:
    """The same for a list, in which an option and its value may be two items."""
    shown = []
    option = ""
    for item in items:
        if isinstance(item, str) and option and not item.startswith("-"):
            shown.append(HIDDEN if secret_key(option) else without_secrets(item))
        else:
            shown.append(without_secrets(item))
        option = item.lstrip("-") if isinstance(item, str) and item.startswith("-") and "=" not in item else ""
    return shown


def word_without_secrets(word: str) -> str:
    """The same for a setting as it is given on the command line, KEY=VALUE."""
    key, equals, _ = word.partition("=")
    return f"{key}={HIDDEN}" if equals and secret_key(key) else redacted(word)
