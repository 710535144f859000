"""A config with some settings changed."""

from typing import Any

from trainer.config.schema import Config
from trainer.run_dir import plain_config


def changed(config: Config, **changes: Any) -> Config:
    """Returns the same config with other values; `engine__compile` stands for engine.compile."""
    tree = plain_config(config)
    for key, value in changes.items():
        *groups, leaf = key.split("__")
        node = tree
        for group in groups:
            node = node[group]
        node[leaf] = value
    return Config.model_validate(tree)


def with_context(config: Config, tokens: int) -> Config:
    """Returns the same config with rows of another length, and as many of them."""
    return changed(config, context_length=tokens, batch_tokens=tokens * config.rows)
