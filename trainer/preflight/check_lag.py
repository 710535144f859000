"""Checks of log.lag: whether a step can be left out before its figures are read."""

from collections.abc import Iterator

from torch import nn

from models.layer import has_hook
from trainer.config.finding import Finding
from trainer.config.schema import Config

ADAMW = "trainer.optim.adamw.AdamW"  # the one whose fused step torch can leave out on a device


def check_lag(config: Config) -> Iterator[Finding]:
    """Checks that a step can be left out on the device, before its figures are read."""
    if not config.log.lag:
        return
    key = "log.lag"
    if config.optim.target != ADAMW:
        name = config.optim.target.rpartition(".")[2]
        fact = f"torch leaves out a step on the device for optim=adamw alone, and here is {name}"
        yield Finding(key, 1, fact, "use log.lag=0 or optim=adamw")
    if config.optim.skip_above:
        fact = f"optim.skip_above={config.optim.skip_above:g} compares a norm before the step"
        yield Finding(key, 1, fact, "use log.lag=0 or optim.skip_above=0")
    if config.engine.name == "deepspeed":
        fact = "engine=deepspeed decides by itself whether it steps"
        yield Finding(key, 1, fact, "use log.lag=0, or engine=fsdp")
    if config.memory.carries:
        fact = f"memory={config.memory.name} takes back what a skipped step carried"
        yield Finding(key, 1, fact, "use log.lag=0, or memory=none")


def check_lag_model(config: Config, model: nn.Module) -> Iterator[Finding]:
    """Checks that no layer changes itself by the statistics of a step."""
    if not config.log.lag:
        return
    for name, module in model.named_modules():
        if has_hook(module, "on_step_end") and any(
            buffer is not None for buffer in module.buffers(recurse=False)
        ):
            fact = f"{name} has a state that the statistics of a step may change before the next"
            yield Finding("log.lag", 1, fact, "use log.lag=0")
            return
