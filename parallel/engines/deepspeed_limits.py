"""Limits of DeepSpeed's ZeRO, checked before any rank starts and without importing DeepSpeed."""

from collections.abc import Iterator

from torch import nn

from models.primitives.sequential import SequentialScan

STAGE = 2  # where none is asked for
OFFLOADS = {
    "none": 0,
    "optimizer": 1,
    "parameters": 3,
}  # what may lie in the host's memory, and the first stage that can


def misfits(
    zero: int,
    offload: str = "none",
    *,
    precision: str = "float32",
    accelerator: bool = False,
    experts: int = 1,
    compile: bool = False,
) -> list[str]:
    """Why these settings do not go together: a sentence each, empty where they do.

    Args:
        accelerator: whether the ranks compute on one.
        others: as the settings of that name.
    """
    return list(_misfits(zero, offload, precision, accelerator, experts, compile))


def _misfits(
    zero: int, offload: str, precision: str, accelerator: bool, experts: int, compile: bool
) -> Iterator[str]:
    if precision == "float64":
        yield (
            "precision=float64: DeepSpeed has no float64; use engine=fsdp or engine=single, or"
            " precision=float32"
        )
    if precision == "bfloat16" and zero == 0:
        yield (
            "engine.zero_stage=0 with precision=bfloat16: DeepSpeed would add gradients up in"
            " bfloat16; use engine.zero_stage=1, or engine=single, which holds everything whole too"
            " and adds up in float32"
        )
    if experts > 1:
        yield (
            f"parallel.experts={experts} with engine=deepspeed: ZeRO takes every parameter to be"
            " the same on all ranks, and each rank would have experts of its own; use engine=fsdp,"
            " or parallel.experts=1"
        )
    if offload not in OFFLOADS:
        yield f"engine.offload={offload} is not offered; use one of {', '.join(OFFLOADS)}"
    elif offload != "none" and not accelerator:
        yield (
            f"engine.offload={offload}, but the ranks compute in the host's memory already; use"
            " engine.offload=none"
        )
    elif zero < OFFLOADS[offload]:
        yield (
            f"engine.offload={offload} needs engine.zero_stage={OFFLOADS[offload]} or more, not"
            f" {zero}"
        )
    if zero == 3 and compile:
        yield (
            "engine.compile=true with engine.zero_stage=3: parameters are gathered between the"
            " modules of a block, which would be compiled as one; use engine.zero_stage=2, or"
            " engine=fsdp"
        )


def unstepped(model: nn.Module, zero: int, context: int) -> Iterator[str]:
    """Why a model with a state that is handed on from token to token does not train so: a sentence,
    or none."""
    if not any(isinstance(module, SequentialScan) for module in model.modules()):
        return
    if zero == 3 or (zero == 2 and context > 1):
        what = "gathers parameters" if zero == 3 else "sums gradients"
        yield (
            f"engine.zero_stage={zero}: DeepSpeed {what} in the middle of a pass, and"
            f" {type(model).__name__} hands a state from one token to the next, so that ranks come"
            " there at different times; use engine.zero_stage=1, or engine=fsdp"
        )
