"""Secrets of a config or a command, hidden before anything of it is shown, sent or published.

Three signs give a secret away: the name of its key, a place in a text where secrets stand
(`KEY=...`, `--password ...`, the user of an address, the parameters of an address, a header), and a
shape that only keys of well-known services have. All readers use these functions, so that what is
hidden in one place is hidden in all.
"""

import re
from typing import Any

HIDDEN = "***"
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
ALWAYS = frozenset(
    [
        "password",
        "passwd",
        "passphrase",
        "pwd",
        "secret",
        "secrets",
        "credential",
        "credentials",
        "authorization",
        "apikey",
        "apikeys",
        "accesskey",
        "privatekey",
        "secretkey",
        "authtoken",
        "accesstoken",
        "bearer",
        "pat",
    ]
)
# A key alone sorts or looks up; with one of these before it, it opens something.
KEY_OF = frozenset(
    [
        "api",
        "access",
        "secret",
        "private",
        "auth",
        "signing",
        "signature",
        "encryption",
        "storage",
        "account",
        "ssh",
        "license",
        "service",
        "deploy",
    ]
)
TOKEN_OF_TEXT = frozenset(
    [
        "bos",
        "eos",
        "pad",
        "unk",
        "mask",
        "sep",
        "cls",
        "special",
        "start",
        "end",
        "stop",
        "next",
        "first",
        "last",
        "any",
        "each",
        "per",
        "of",
    ]
)
IN_QUERY = frozenset(["sig", "signature", "key", "code", "credential"])

IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")
# A key and what stands between it and its value, in this order: of an address, of an assignment or
# JSON, of an option.
QUERY = re.compile(r"[?&;](?P<key>[\w.%-]+)=")
ASSIGNED = re.compile(r"(?<![\w.])(?P<key>[A-Za-z_][\w.-]*)[\"']?\s*(?:=|:(?!//))\s*")
OPTION = re.compile(r"(?<!\S)--?(?P<key>[A-Za-z][\w-]*)\s+(?!-)")
VALUE = re.compile(r"\"[^\"]*\"|'[^']*'|[^\s&;,|#'\"}\])]+")
HEADER = re.compile(
    r"(?P<before>\b(?:Bearer|Basic|Digest|Negotiate)\s+)(?P<value>[\w.~+/=-]{6,})", re.I
)
LOGIN = re.compile(
    r"(?<![\w-])(?P<before>(?:wandb|hf|huggingface-cli)\s+(?:auth\s+)?login\s+|(?:-u|--user)[\s=]+[^\s:=]+:|sshpass\s+-p\s*)"
    r"(?P<value>[^\s;|&-]\S*)"
)
SHAPE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abeoprs]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|ya29\.[\w-]{16,}|npm_[A-Za-z0-9]{30,}"
    r"|pypi-[\w-]{16,}|dckr_pat_[\w-]{16,}|wandb_v\d+_\w{16,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
SCHEME = re.compile(r"Bearer|Basic|Digest|Negotiate", re.I)
BLOCK = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S
)


def secret_key(key: str) -> bool:
    """Reports that the name of a key or variable marks its value as secret."""
    words = _words(key)
    if any(word in ALWAYS for word in words):
        return True
    for before, word in zip(["", *words], words):
        if word in ("key", "keys") and before in KEY_OF:
            return True
    if not words or words[-1] not in ("token", "tokens"):
        return False
    if (
        words[-1] == "tokens"
    ):  # counts of tokens are everywhere; several secrets are rare and say what they open
        return not KEY_OF.isdisjoint(words[-2:-1])
    return len(words) < 2 or words[-2] not in TOKEN_OF_TEXT


def _words(key: str) -> list[str]:
    return [word.lower() for word in re.split(r"[\W_]+", CAMEL.sub("_", key)) if word]


def redacted(text: str) -> str:
    """A text fit to be shown."""
    text = BLOCK.sub(HIDDEN, text)
    text = IN_ADDRESS.sub(f"{HIDDEN}@", text)
    text = HEADER.sub(_hide, text)
    text = _values_hidden(text, QUERY, IN_QUERY)
    text = _values_hidden(text, ASSIGNED)
    text = _values_hidden(text, OPTION)
    text = LOGIN.sub(_hide, text)
    return SHAPE.sub(HIDDEN, text)


def _hide(match: re.Match[str]) -> str:
    return f"{match['before']}{HIDDEN}"


def _values_hidden(text: str, keys: re.Pattern[str], certain: frozenset[str] = frozenset()) -> str:
    """Every value hidden whose key names a secret, or is one of `certain`. What another key stands
    for is looked into."""
    shown = []
    done = 0
    while (match := keys.search(text, done)) is not None:
        shown.append(text[done : match.end()])
        done = match.end()
        value = VALUE.match(text, done)
        if value is None or not (
            secret_key(match["key"]) or certain.intersection(_words(match["key"])[-1:])
        ):
            continue
        if SCHEME.fullmatch(
            value[0]
        ):  # `Authorization: Bearer ***`: the secret behind the scheme is hidden already
            continue
        shown.append(HIDDEN)
        done = value.end()
    return "".join([*shown, text[done:]])


def without_secrets(value: Any) -> Any:
    """A config fit to be shown: every secret in it becomes ***."""
    if isinstance(value, dict):
        hidden = {key for key, item in value.items() if secret_key(str(key)) and item is not None}
        return {
            key: HIDDEN if key in hidden else without_secrets(item) for key, item in value.items()
        }
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
        option = (
            item.lstrip("-")
            if isinstance(item, str) and item.startswith("-") and "=" not in item
            else ""
        )
    return shown


def word_without_secrets(word: str) -> str:
    """The same for a setting as it is given on the command line, KEY=VALUE."""
    key, equals, _ = word.partition("=")
    return f"{key}={HIDDEN}" if equals and secret_key(key) else redacted(word)
