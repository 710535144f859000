"""What must not be shown of a config or a command: secrets, known by the names of their keys, and passwords in addresses."""

import re
from typing import Any

SECRET = re.compile(r"(^|[_.-])(api_?key|secret|password|passwd|credentials?|token)$", re.I)
IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")
HIDDEN = "***"


def without_secrets(value: Any) -> Any:
    """A config fit to be shown: secrets and passwords inside addresses become ***."""
    if isinstance(value, dict):
        hidden = {key for key, item in value.items() if SECRET.search(str(key)) and item is not None}
        return {key: HIDDEN if key in hidden else without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return IN_ADDRESS.sub(f"{HIDDEN}@", value) if isinstance(value, str) else value


def word_without_secrets(word: str) -> str:
    """The same for a setting as it is given on the command line, KEY=VALUE."""
    key, equals, _ = word.partition("=")
    return f"{key}={HIDDEN}" if equals and SECRET.search(key) else without_secrets(word)
