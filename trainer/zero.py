"""What engine=deepspeed cannot honour, asked by the check before any rank starts; DeepSpeed itself is not imported."""

from collections.abc import Iterator

from torch import nn

from parallel.engines.zero import STAGE, misfits, unstepped
from parallel.launch import machine
from trainer.config import Config

MUON = "trainer.muon.Muon"


def settings(config: Config) -> Iterator[str]:
    """Of the config alone."""
    asked = config.engine
    yield from misfits(
        _stage(config),
        asked.offload or "none",
        precision=config.precision,
        accelerator=machine()[1] > 0,
        experts=config.parallel.experts,
        compile=asked.compile,
    )
    if _stage(config) and config.optim.target == MUON:
        yield (
            f"optim=muon with engine.zero={_stage(config)}: DeepSpeed cuts parameters up into flat pieces, and Muon needs "
            "whole matrices; use optim=adamw, or engine=fsdp, which gathers them"
        )


def handed_on(config: Config, model: nn.Module) -> Iterator[str]:
    """Of the built model."""
    yield from unstepped(model, _stage(config), config.parallel.context)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            yield (
                f"engine=deepspeed: {name} is a parameter without dims, which DeepSpeed cannot hold; give it the shape [1], "
                "or use engine=fsdp"
            )


def _stage(config: Config) -> int:
    return STAGE if config.engine.zero is None else config.engine.zero
