"""Checks the loggers that a config names: their classes, settings and packages."""

import importlib.util
from collections.abc import Iterator

from trainer.config.finding import Finding
from trainer.config.instantiate import instantiate
from trainer.config.node_checks import node_errors
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.logs.loggers.base import Logger


def check_loggers(config: Config) -> Iterator[Finding | str]:
    """Checks that every logger can be made on this machine."""
    for name, node in config.logger.nodes.items():
        where = f"logger.{name}"
        sentences = node_errors(node, {}, where)
        if sentences:
            yield from sentences
            continue
        try:
            logger = instantiate(node, {}, where)
        except UserError as error:
            yield str(error)
            continue
        if not isinstance(logger, Logger):
            yield Finding(
                f"{where}._target_",
                node.target,
                "it is no logger",
                "name a subclass of trainer.logs.loggers.base.Logger",
            )
        elif logger.needs is not None and importlib.util.find_spec(logger.needs.module) is None:
            yield Finding(
                "logger",
                name,
                f"it needs the package {logger.needs.package}, which is not installed",
                f"pip install {logger.needs.package}",
            )
