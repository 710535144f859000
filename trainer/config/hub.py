"""Puts the architecture of a Hugging Face model into the config: model=hub model.path=FOLDER.

The whole architecture stands in the config of the run, so that the run needs the folder no more,
and any setting of it may be given on the command line, as position=yarn or model.layers=2.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.hub.adapter import Adapter, Architecture
from models.hub.description import TARGET
from models.hub.registry import adapter_of
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.init_from.huggingface import read_config, refusal


def read_architecture(path: str) -> Architecture:
    """Returns the architecture that a folder's config.json describes.

    Raises:
        UserError: there is none, no adapter reads it, or a key of it cannot be honoured.
    """
    try:
        content = read_config(Path(path))
        return adapter_of(content).architecture(content)
    except UserError as error:
        raise UserError(f"model.path={path}: {error}", error.code) from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"model.path={path}: {refusal(error)}") from error


def expand_hub(tree: dict[Any, Any], overrides: Sequence[str]) -> None:
    """Fills the nodes `model` and `position` of a plain config, where model.path is set.

    Args:
        tree: the composed config.
        overrides: Hydra's words; what they set counts more than config.json.
    """
    model = tree.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("path"), str):
        return
    architecture = read_architecture(model["path"])
    tree["model"] = _merged(architecture.model, model)
    chosen = [word.lstrip("+").partition("=")[0] for word in overrides]
    if f"model.{TARGET}" not in chosen:
        # conf/model/hub.yaml names a decoder, because a model has to have a class.
        tree["model"][TARGET] = architecture.model[TARGET]
    if "position" in chosen:
        return
    position = dict(architecture.position)
    for key in chosen:
        if key.startswith("position."):
            name = key.removeprefix("position.")
            position[name] = tree["position"].get(name)
    tree["position"] = position


def described_config(
    config: Config, adapter: Adapter, content: Mapping[str, Any]
) -> tuple[Config, int]:
    """Returns a config with the model of a config.json in place of its own, and its vocabulary."""
    architecture = adapter.architecture(content)
    tree = plain(config)
    tree["model"] = architecture.model
    tree["position"] = architecture.position
    tree["mixer"] = None
    return Config.model_validate(tree), architecture.model["vocabulary"]


def plain(config: Config) -> dict[str, Any]:
    """Returns a config as plain data."""
    return config.model_dump(by_alias=True)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Returns two trees in one; the second counts more."""
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            merged[key] = _merged(inner, value)
        else:
            merged[key] = value
    return merged
