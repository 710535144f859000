"""Checks sizes against the memory that the machines of a run have at most.

The checks take lower bounds only, so that nothing is refused that could run: parameters, gradients
and the two moments of the optimiser, once or on every rank where the engine holds them whole; one
residual stream of the rows of a forward; the tokens of a step; the carried state. launch.force=true
leaves them out.
"""

import os
from collections.abc import Iterator

from torch import nn

from trainer.config.finding import NO_VALUE_SHOWN, Finding
from trainer.config.schema import Config
from trainer.launch.elastic import machine_limits

GPU_BYTES = 2**40  # of one accelerator, more than any has: it is not asked
HOST_BYTES = 2**44  # of a machine other than this one
STATE_TENSORS = 4  # a parameter, its gradient and the two moments of Adam
TOKEN_BYTES = 8  # of a token's number


def machine_bytes(config: Config) -> int:
    """Returns the bytes of memory that the machines of the run have at most."""
    launch = config.launch
    if launch.name == "slurm":
        if launch.gpus is None:
            gpus = config.parallel.ranks
        else:
            gpus = launch.gpus * launch.nodes
        return HOST_BYTES * launch.nodes + GPU_BYTES * gpus
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    this_machine = host_bytes + GPU_BYTES * machine_limits()[1]
    if launch.nodes == 1:
        return this_machine
    return this_machine + (HOST_BYTES + 8 * GPU_BYTES) * (launch.nodes - 1)


def check_step_memory(config: Config) -> Iterator[Finding]:
    """Checks that the tokens of a step and the carried state could fit into memory."""
    if config.launch.force:
        return
    limit = machine_bytes(config)
    element_bytes = _element_bytes(config)
    token_state_bytes = config.model.width * element_bytes
    # Of a row that is cut in time, one piece is computed at once.
    tokens = -(-config.context_length // config.parallel.time)
    stream_bytes = tokens * token_state_bytes * config.parallel.data
    if stream_bytes > limit:
        yield Finding(
            "context_length",
            config.context_length,
            f"one residual stream of model.width={config.model.width} is {_gib(stream_bytes)} for"
            f" the rows of one forward, but there are {_gib(limit)} of memory",
            "use a shorter context_length, or more pieces (parallel.time)",
            causes=("model.width", "parallel.data", "precision"),
        )
    batch_bytes = config.batch_tokens * TOKEN_BYTES
    if batch_bytes > limit:
        yield Finding(
            "batch_tokens",
            config.batch_tokens,
            f"their numbers alone are {_gib(batch_bytes)}, but there are {_gib(limit)} of memory",
            "use fewer",
        )
    carried_bytes = config.memory.length * token_state_bytes
    if carried_bytes > limit:
        yield Finding(
            "memory.length",
            config.memory.length,
            f"at model.width={config.model.width} that is {_gib(carried_bytes)}, but there are"
            f" {_gib(limit)} of memory",
            "use a shorter memory.length",
            causes=("model.width", "precision"),
        )


def check_model_memory(config: Config, model: nn.Module) -> Iterator[Finding]:
    """Checks that the parameters of a model could fit into memory, and names the largest."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if not sizes or config.launch.force:
        return
    # Only engine=single holds the parameters whole on every rank; the others shard them.
    copies = config.parallel.ranks if config.engine.name == "single" else 1
    count = sum(sizes.values())
    limit = machine_bytes(config)
    needed_bytes = count * STATE_TENSORS * copies * _element_bytes(config)
    if needed_bytes <= limit:
        return
    largest = max(sizes, key=lambda name: sizes[name])
    on_ranks = f" on each of {copies} ranks" if copies > 1 else ""
    yield Finding(
        "model",
        NO_VALUE_SHOWN,
        f"has {count:,} parameters, {sizes[largest]:,} of them in {largest}; with"
        f" gradients and the optimiser's state{on_ranks} that is {_gib(needed_bytes)}, but there"
        f" are {_gib(limit)} of memory",
        "choose smaller sizes",
    )


def _element_bytes(config: Config) -> int:
    """Returns the bytes of one number; bfloat16 keeps its master weights in float32."""
    return 8 if config.precision == "float64" else 4


def _gib(count: int) -> str:
    return f"{count / 2**30:,.0f} GiB"
