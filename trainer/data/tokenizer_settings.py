"""Settings that a saved tokenizer has beside its tokenizer.json: special tokens, chat templates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.files.limited_reader import contents, json_file

LARGEST_SETTINGS = 16 << 20  # bytes of any of these files
SETTINGS = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
SHOWN = 60  # characters that a message quotes


@dataclass(frozen=True)
class TokenizerSettings:
    """The statements of the files beside a tokenizer.json.

    Attributes:
        special: {name: text} of the special tokens, as chat templates call them: bos_token, ...
        templates: {name: source} of the chat templates; "default" is the usual one.
    """

    special: Mapping[str, str] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)


def read_settings(folder: Path) -> TokenizerSettings:
    """Reads the settings in the folder of a tokenizer.json; none where there are no such files.

    Raises:
        ValueError: a file is damaged.
    """
    settings = _object(folder / SETTINGS)
    # The file of its own has the last word in transformers too.
    special = _special(_object(folder / SPECIAL), folder / SPECIAL)
    special |= _special(settings, folder / SETTINGS)
    templates = _templates(settings.get("chat_template"), folder / SETTINGS)
    if (folder / TEMPLATE).is_file():
        try:
            templates["default"] = contents(folder / TEMPLATE, LARGEST_SETTINGS).decode("utf-8")
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{folder / TEMPLATE} is no chat template ({error}); mend or remove it"
            ) from error
    return TokenizerSettings(special, templates)


def _object(file: Path) -> dict[str, Any]:
    """Returns the object of a JSON file; an empty one where there is no such file."""
    if not file.is_file():
        return {}
    try:
        settings = json_file(file, LARGEST_SETTINGS)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{file} is not JSON settings of a tokenizer ({error}); mend or remove it"
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{file} is not JSON settings of a tokenizer (it is no object); mend or remove it"
        )
    return settings


def _special(settings: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Returns the special tokens that settings name."""
    named = {f"{name}_token": settings.get(f"{name}_token") for name in NAMES}
    further = settings.get("extra_special_tokens")
    if isinstance(further, Mapping):
        named |= {str(name): value for name, value in further.items()}
    special: dict[str, str] = {}
    for name, value in named.items():
        word = value.get("content") if isinstance(value, Mapping) else value
        if word is None:
            continue
        if not isinstance(word, str):
            raise ValueError(f"{file}: {name}={word!r:.{SHOWN}} is no text; mend or remove it")
        special[name] = word
    return special


def _templates(value: Any, file: Path) -> dict[str, str]:
    """Returns the chat templates of settings: one text, or a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    named: dict[str, str] = {}
    for entry in value if isinstance(value, list) else []:
        if isinstance(entry, Mapping) and isinstance(entry.get("template"), str):
            named[str(entry.get("name"))] = entry["template"]
    if not named:
        raise ValueError(
            f"{file}: chat_template is no text and no list of texts; mend or remove it"
        )
    return named
