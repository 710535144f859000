"""Sizes that no machine has: what certainly does not fit is refused before any rank is started.

Only lower bounds are taken, so that nothing is refused that could run: parameters, gradients and
the optimiser's two moments once, or on every rank where the engine holds them whole; one residual
stream of the rows that are worked on at a time; the tokens of a step; what a memory carries.
`python -m trainer --help` says nothing of it, for there is nothing to set.
"""

import os
from collections.abc import Iterator

from torch import nn

from trainer.config.schema import Config
from trainer.launch.elastic import machine_limits

GPU_BYTES = 2**40  # of one accelerator, which is not asked: more than any has
HOST_BYTES = 2**44  # of a machine that is not this one
STATE = 4  # a parameter, its gradient and two moments


def machine_bytes(config: Config) -> int:
    """Memory that the machines of the run have at most."""
    wish = config.launch
    if wish.name == "slurm":
        gpus = config.parallel.ranks if wish.gpus is None else wish.gpus * wish.nodes
        return HOST_BYTES * wish.nodes + GPU_BYTES * gpus
    here = (
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + GPU_BYTES * machine_limits()[1]
    )
    return here if wish.nodes == 1 else here + (HOST_BYTES + 8 * GPU_BYTES) * (wish.nodes - 1)


def tokens(config: Config) -> Iterator[str]:
    """Whether the tokens of a step and what a memory carries could lie anywhere."""
    limit = machine_bytes(config)
    width = 8 if config.precision == "float64" else 4
    stream = config.context_length * config.model.width * width * config.parallel.data
    if stream > limit:
        yield (
            f"context_length={config.context_length}: one residual stream of"
            f" model.width={config.model.width} is {_gib(stream)} for the rows at hand, and there"
            f" is memory of {_gib(limit)}; use a shorter context_length"
        )
    if config.batch_tokens * 8 > limit:
        yield (
            f"batch_tokens={config.batch_tokens}: their numbers alone are"
            f" {_gib(config.batch_tokens * 8)}, and there is memory of {_gib(limit)}; use fewer"
        )
    carried = config.memory.length * config.model.width * width
    if carried > limit:
        yield (
            f"memory.length={config.memory.length}: of model.width={config.model.width} that is"
            f" {_gib(carried)}, and there is memory of {_gib(limit)}; use a shorter memory.length"
        )


def parameters(config: Config, model: nn.Module) -> Iterator[str]:
    """Whether the parameters of a model could lie anywhere; the largest of them is named."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if not sizes:
        return
    copies = config.parallel.ranks if config.engine.name == "single" else 1
    count = sum(sizes.values())
    limit = machine_bytes(config)
    needed = count * STATE * copies * (8 if config.precision == "float64" else 4)
    if needed > limit:
        largest = max(sizes, key=lambda name: sizes[name])
        held = f" on each of {copies} ranks" if copies > 1 else ""
        yield (
            f"the model has {count:,} parameters, {sizes[largest]:,} of them in {largest}; with"
            f" gradients and the optimiser's state{held} that is {_gib(needed)}, and there is"
            f" memory of {_gib(limit)}; choose smaller sizes"
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:,.0f} GiB"
