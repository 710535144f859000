"""Checks that a step could fit into the memory that this machine has for its ranks.

Two bounds from below, so that nothing is refused that could run. The first is arithmetic: the
parameters, their gradients and moments, and what comes into every block. Only where that takes a
notable part of the memory does a trace of the model on the meta device count what it keeps for
backward. `python -m scripts.plan` says what a step takes in truth; launch.force=true leaves the
check out.
"""

import subprocess
from collections.abc import Iterator
from functools import cache

from torch import nn

from models.cost.activation_memory import activation_bytes
from models.cost.parameters import BYTES
from parallel.engines.base import blocks_of
from trainer.config.finding import Finding
from trainer.config.schema import Config
from trainer.launch.elastic import machine_limits
from trainer.optim.selection import count_trained
from trainer.planning.devices import host_memory_bytes, shown

# Moments of a parameter that an optimiser keeps at least; one of a user's own may keep none.
MOMENTS = {"trainer.optim.adamw.AdamW": 2, "trainer.optim.muon.Muon": 1}
NOTABLE = 1 / 16  # of the memory: from here on the model is traced
ASK_S = 5.0  # for the sizes of the GPUs
ASK = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")


def check_memory(config: Config, model: nn.Module) -> Iterator[Finding]:
    """Checks a config whose ranks start on this machine against the memory that is here.

    Args:
        config: of a run.
        model: of that config, on the meta device.
    """
    if config.launch.force or config.launch.name != "local":
        return
    gpus = machine_limits()[1]
    limit = gpu_bytes() if gpus else host_memory_bytes() // config.parallel.ranks
    offload = config.engine.offload or "none"
    if limit is None or (config.engine.name == "deepspeed" and offload != "none"):
        return
    holders = 1 if config.engine.name == "single" else config.parallel.ranks
    moments = MOMENTS.get(config.optim.target, 0) * count_trained(model, config.optim.freeze)
    moments_bytes = moments * _stored_bytes(config) // holders
    state = _weights_and_gradients(config, model) * _stored_bytes(config) // holders
    of = "parameters and gradients"
    if offload == "optimizer":
        yield from _check_host(config, moments_bytes)
    else:
        state += moments_bytes
        of = "parameters, gradients and optimiser"
    tokens = tokens_at_once(config)
    blocks = len(blocks_of(model))
    kept_blocks = min(1, blocks) if config.engine.offload_activations else blocks
    kept = kept_blocks * tokens * config.model.width * BYTES[config.precision]
    if kept + state > NOTABLE * limit:
        kept = max(kept, _traced(config, model, tokens))
    if kept + state <= limit:
        return
    where = "of a GPU" if gpus else "for each rank of this machine"
    yield Finding(
        "context_length",
        config.context_length,
        f"a step keeps at least {shown(kept)} of activations and {shown(state)} of {of} on a rank,"
        f" but there are {shown(limit)} {where}",
        "see python -m scripts.plan for what helps, or launch.force=true to try",
        causes=("batch_tokens", "parallel.context", "model.width", "model.layers", "precision"),
    )


def tokens_at_once(config: Config) -> int:
    """Returns the tokens that a rank computes at once, at least."""
    parallel = config.parallel
    tokens = -(-config.context_length // (parallel.context * parallel.time))
    rows = -(-config.rows // parallel.data)
    asked = 1 if parallel.micro_batch == "auto" else int(parallel.micro_batch)
    return tokens * min(asked, rows)


def _traced(config: Config, model: nn.Module, tokens: int) -> int:
    """Returns the bytes that the model keeps for backward, as its operations say; 0 if unknown.

    What is cut into tiles, heads or time or waits on the host is less than a trace of whole rows
    says.
    """
    engine = config.engine
    in_parts = engine.tile_tokens or engine.head_groups or config.parallel.time > 1
    if in_parts or engine.offload_activations:
        return 0
    try:
        return activation_bytes(model, tokens, config.precision, engine.checkpointing)
    except (ValueError, TypeError, RuntimeError):  # a model that has no such rows
        return 0


def _weights_and_gradients(config: Config, model: nn.Module) -> int:
    """Returns the numbers of the parameters, and of the gradients of those trained."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return total + count_trained(model, config.optim.freeze)


def _check_host(config: Config, moments_bytes: int) -> Iterator[Finding]:
    """Checks that the host of this machine holds the moments of its ranks."""
    ranks = config.parallel.ranks
    there = host_memory_bytes()
    if ranks * moments_bytes <= there:
        return
    yield Finding(
        "engine.offload",
        "optimizer",
        f"{ranks} ranks keep {shown(moments_bytes)} of the optimiser's state each on the host,"
        f" which has {shown(there)}",
        "use engine.offload=none, or launch.force=true to try",
        causes=("model.width", "model.layers", "precision"),
    )


def _stored_bytes(config: Config) -> int:
    """Returns the bytes of a stored number; bfloat16 keeps its master weights in float32."""
    return 8 if config.precision == "float64" else 4


@cache
def gpu_bytes() -> int | None:
    """Returns the memory of the smallest GPU of this machine; None where nobody says.

    Asked of the driver's own tool: torch would open a context on a GPU, in a process that computes
    nothing.
    """
    try:
        answer = subprocess.run(ASK, capture_output=True, text=True, timeout=ASK_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    sizes = [int(line) for line in answer.stdout.split() if line.isdecimal()]
    return min(sizes) << 20 if sizes else None
