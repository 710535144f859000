"""Advice from plans of a config: the largest context that fits, and what would help most."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from trainer.config.finding import Finding, render
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.planning.changed_config import changed, with_context
from trainer.planning.step_plan import StepPlan

LONGEST = 1 << 24  # tokens; no search goes further
STEP = 256  # the largest context is found in multiples of it, or of twice the ranks of a row
KNOBS = 3  # that are named
MOST_PLANS = 12  # of one search
CLOSE = 1 / 64  # the search ends where the next context is within this of one that fits

PlanOf = Callable[[Config], StepPlan]
PeakOf = Callable[[Config], int]


class Knob(NamedTuple):
    """A changed setting, and what it gains alone: bytes of the peak and seconds of a step.

    A negative gain is a cost.
    """

    setting: str
    saved_bytes: int
    saved_seconds: float


def require_plannable(config: Config) -> None:
    """Refuses what a plan does not cover, so that no figure is of another run.

    Raises:
        UserError: one line for each such setting.
    """
    engine = config.engine
    offload = getattr(engine, "offload", None)
    wrong = [
        (
            "engine.offload",
            str(offload),
            engine.name == "deepspeed" and offload not in (None, "none"),
            "a plan does not tell DeepSpeed's shards on the host from those on the device",
            "engine.offload=none",
        ),
        ("stages", "[...]", bool(config.stages), "a plan is of one stage", "stages=[]"),
    ]
    messages = []
    for key, value, fails, fact, remedy in wrong:
        if fails:
            messages.append(render(Finding(key, value, fact, f"plan with {remedy}")))
    if messages:
        raise UserError("\n".join(messages))


def largest_context(config: Config, memory_bytes: int, peak_of: PeakOf) -> int:
    """Returns the longest context whose step fits, in as many rows; 0 where none does.

    The peak is close to a straight line in the tokens, so each context that is tried lies where the
    line through the last two that were planned reaches the memory.

    Args:
        config: whose other settings stay.
        memory_bytes: for the tensors of a rank.
        peak_of: plans the fullest rank.
    """
    unit = max(STEP, 2 * config.parallel.context * config.parallel.time)
    most = LONGEST // unit
    peaks: dict[int, int] = {}

    def peak(units: int) -> int:
        if units not in peaks:
            peaks[units] = peak_of(with_context(config, units * unit))
        return peaks[units]

    if peak(1) > memory_bytes:
        return 0
    low = 1  # fits
    high = most + 1  # does not, or is not looked at
    guess = min(most, max(2, config.context_length // unit))
    while high - low > max(1, low * CLOSE) and len(peaks) < MOST_PLANS:
        guess = min(max(guess, low + 1), high - 1)
        if peak(guess) <= memory_bytes:
            low = guess
        else:
            high = guess
        guess = _where_it_is_full(peaks, memory_bytes, low, high)
    return low * unit


def _where_it_is_full(peaks: dict[int, int], memory_bytes: int, low: int, high: int) -> int:
    """Returns the units at which the line through two planned contexts reaches the memory."""
    other = high if high in peaks else max((units for units in peaks if units < low), default=low)
    if other == low or peaks[other] == peaks[low]:
        return 2 * low
    slope = (peaks[other] - peaks[low]) / (other - low)
    guess = low + int((memory_bytes - peaks[low]) / slope)
    # One that is a little too long closes the search as well as one that fits.
    return guess + 1 if guess == low else guess


def best_knobs(
    config: Config,
    plan: StepPlan,
    memory_bytes: int,
    plan_of: PlanOf,
    is_valid: Callable[[Config], bool] = lambda config: True,
) -> list[Knob]:
    """Returns the settings that help most, the best first.

    Where the config does not fit, they are those that lower the peak most; where it does, those
    that save most seconds and still fit.

    Args:
        config: that was planned.
        plan: of its fullest rank.
        memory_bytes: of a rank.
        plan_of: plans another config.
        is_valid: tells whether another config would be run.
    """
    found = []
    fits = plan.peak_bytes <= memory_bytes
    for setting, other in _changes(config):
        if not is_valid(other):
            continue
        there = plan_of(other)
        saved_bytes = plan.peak_bytes - there.peak_bytes
        saved_seconds = plan.costs.total_seconds - there.costs.total_seconds
        helps = saved_seconds > 0 and there.peak_bytes <= memory_bytes if fits else saved_bytes > 0
        if helps:
            found.append(Knob(setting, saved_bytes, saved_seconds))
    if fits:
        return sorted(found, key=lambda knob: -knob.saved_seconds)[:KNOBS]
    return sorted(found, key=lambda knob: -knob.saved_bytes)[:KNOBS]


def _changes(config: Config) -> Iterator[tuple[str, Config]]:
    """Yields what can be set otherwise without changing what is trained."""
    engine = config.engine
    parallel = config.parallel
    for checkpointing in ("none", "selective", "full"):
        if engine.checkpointing != checkpointing:
            yield (
                f"engine.checkpointing={checkpointing}",
                changed(config, engine__checkpointing=checkpointing),
            )
    if not engine.offload_activations:
        yield "engine.offload_activations=true", changed(config, engine__offload_activations=True)
    if engine.name != "deepspeed" and engine.offload in (None, "none"):
        yield "engine.offload=optimizer", changed(config, engine__offload="optimizer")
    elif engine.offload == "optimizer":
        yield "engine.offload=none", changed(config, engine__offload="none")
    yield (
        f"parallel.time={2 * parallel.time}",
        changed(config, parallel__time=2 * parallel.time),
    )
    if engine.tile_tokens is None:
        tokens = max(256, config.context_length // parallel.context // 16)
        yield f"engine.tile_tokens={tokens}", changed(config, engine__tile_tokens=tokens)
    else:
        yield "engine.tile_tokens=null", changed(config, engine__tile_tokens=None)
    if engine.head_groups is not None:
        yield "engine.head_groups=null", changed(config, engine__head_groups=None)
    elif parallel.time == 1 and engine.checkpointing != "selective" and not engine.compile:
        groups = next((n for n in (8, 4, 2) if config.model.heads % n == 0), None)
        if groups is not None:
            yield f"engine.head_groups={groups}", changed(config, engine__head_groups=groups)
    if engine.name == "single" and parallel.ranks > 1:
        target = "parallel.engines.fsdp.Fsdp"
        yield "engine=fsdp", changed(config, engine__name="fsdp", engine___target_=target)
    if engine.name == "fsdp":
        other = not (engine.reshard_after_forward is not False)
        yield (
            f"engine.reshard_after_forward={str(other).lower()}",
            changed(config, engine__reshard_after_forward=other),
        )
    if parallel.micro_batch != 1 and config.rows > parallel.data:
        yield "parallel.micro_batch=1", changed(config, parallel__micro_batch=1)
    if parallel.context > 1:
        for method in ("ring", "ulysses", "allgather"):
            if method != parallel.method:
                yield (
                    f"parallel.method={method}",
                    changed(
                        config,
                        parallel__method=method,
                        parallel__ulysses=None,
                        parallel__ring=None,
                    ),
                )
    if config.precision == "float32":
        yield "precision=bfloat16", changed(config, precision="bfloat16")
    yield (
        f"parallel.context={2 * parallel.context}, twice the ranks",
        changed(config, parallel__context=2 * parallel.context),
    )
