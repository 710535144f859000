"""The command `python -m scripts.plan`: reads its words and prints what was planned."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from parallel.activation_offload import AT_HOME
from parallel.engines.optimizer_offload import STATE_AT_HOME
from trainer.config.compose import compose
from trainer.config.finding import Finding, as_finding, render
from trainer.config.schema import Config
from trainer.errors import BAD_CONFIG, DONE, UserError
from trainer.objectives.stream import vocabulary_of
from trainer.planning.advice import best_knobs, largest_context, require_plannable
from trainer.planning.devices import Device, read_device, shown, size_of
from trainer.planning.step_costs import TERMS
from trainer.planning.step_plan import StepPlan, plan_step
from trainer.planning.watched_step import KINDS
from trainer.preflight.check import check_config

WORDS = ("gpus", "device", "memory", "search")
COMPILED = (
    "engine.compile=true: memory and seconds are bounds from above, those of blocks that are not"
    " compiled"
)
ROOM = 0.97  # of a device's memory: the rest is its context and what an allocator leaves unused


class PlanRequest(NamedTuple):
    """The wishes of a command line.

    Attributes:
        overrides: of the run.
        device: that the ranks run on.
        memory_bytes: of one rank.
        search: whether the largest context and the knobs are looked for.
    """

    overrides: list[str]
    device: Device
    memory_bytes: int
    search: bool


def plan_command(words: Sequence[str]) -> int:
    """Prints the plan of a config; returns the exit status.

    Args:
        words: overrides of the run, gpus=, device=, memory= and search=.

    Raises:
        UserError: a wish that cannot be honoured.
    """
    wishes = read_wishes(words)
    config = _config(wishes.overrides, wishes.device)
    require_plannable(config)
    vocabulary = vocabulary_of(config)
    began = time.perf_counter()
    plan = fullest(config, vocabulary, wishes.device)
    seconds = time.perf_counter() - began
    for line in describe(config, plan):
        print(line, flush=True)
    print(f"planned in {seconds:.1f} s", flush=True)
    for line in advise(config, vocabulary, plan, wishes):
        print(line, flush=True)
    return DONE


def describe(config: Config, plan: StepPlan) -> list[str]:
    """Returns the lines about one plan."""
    parallel = config.parallel
    costs = plan.costs
    seconds = costs.total_seconds
    tokens = config.batch_tokens
    lines = [
        f"{parallel.ranks} ranks = parallel.context={parallel.context} x"
        f" parallel.data={parallel.data}, engine={config.engine.name}, {config.precision};"
        f" {config.rows} rows of {config.context_length} tokens, a document each",
        f"memory of rank {plan.rank}, the fullest: {shown(plan.peak_bytes)} at the peak of a step",
    ]
    lines += [f"  {kind:36}{shown(plan.by_kind[kind]):>14}" for kind in KINDS if plan.by_kind[kind]]
    if config.engine.compile:
        lines.append(COMPILED)
    if plan.host_bytes:
        lines.append(f"waits in the memory of the host, for each rank: {shown(plan.host_bytes)}")
    lines.append(f"sent by that rank for sharing rows and experts, {_sum(plan.sent_bytes)} a step")
    for (move, link), size in sorted(plan.sent_over.items()):
        lines.append(f"  {f'{move} {link}':36}{shown(size):>14}")
    everything = sum(costs.sent.values())
    lines.append(f"everything that it sends, weights and gradients too, {shown(everything)}")
    for (operation, link), size in sorted(costs.sent.items()):
        lines.append(f"  {f'{operation} {link}':36}{shown(size):>14}")
    lines.append(f"FLOPs of that rank: {costs.flops:.3e}")
    lines.append(
        f"a step takes {seconds:,.3g} s, {tokens / seconds:,.0f} tokens/s; most of it:"
        f" {costs.bottleneck}"
    )
    lines += [
        f"  {term:36}{costs.seconds[term]:>12,.3g} s" for term in TERMS if costs.seconds[term]
    ]
    return lines


def advise(config: Config, vocabulary: int, plan: StepPlan, wishes: PlanRequest) -> list[str]:
    """Returns the lines about what fits into a memory, and what would help."""

    def plan_of(other: Config) -> StepPlan:
        rank = min(plan.rank, other.parallel.ranks - 1)
        return plan_step(other, vocabulary, rank, wishes.device)

    limit = wishes.memory_bytes
    fits = "fits" if plan.peak_bytes <= limit else "does not fit"
    lines = [f"this config {fits} into {shown(limit)}, {ROOM:.0%} of what a rank has"]
    if not wishes.search:
        return lines

    def is_valid(other: Config) -> bool:
        faults = check_config(other, started=other.parallel.ranks, starter="plan")
        return not _of_device(faults, wishes.device)

    longest = largest_context(config, limit, lambda other: plan_of(other).peak_bytes)
    lines.append(f"largest context that fits, in as many rows: {longest:,} tokens")
    knobs = best_knobs(config, plan, limit, plan_of, is_valid)
    lines += [f"settings that would help most, each alone{'' if knobs else ': none'}"]
    for knob in knobs:
        size = _signed(knob.saved_bytes, shown(abs(knob.saved_bytes)))
        seconds = _signed(knob.saved_seconds, f"{abs(knob.saved_seconds):,.3g} s a step")
        lines.append(f"  {knob.setting:36}{size:>14}, {seconds}")
    return lines


def fullest(config: Config, vocabulary: int, device: Device) -> StepPlan:
    """Plans the ranks that can differ, those of one row, and returns the fullest.

    Of many ranks the first and the last are planned: under a zigzag or contiguous layout the others
    lie between them.
    """
    last = config.parallel.context - 1
    plans = [plan_step(config, vocabulary, rank, device) for rank in sorted({0, last})]
    return max(plans, key=lambda plan: plan.peak_bytes)


def read_wishes(words: Sequence[str]) -> PlanRequest:
    """Tells the words of the command from the overrides of the run.

    Raises:
        UserError: a word that says nothing.
    """
    own: dict[str, str] = {}
    overrides = []
    for word in words:
        key, found, value = word.partition("=")
        # memory= is a group of the run as well: a size begins with a digit, a memory does not.
        is_run = key == "memory" and not value[:1].isdigit()
        if found and key in WORDS and not is_run:
            own[key] = value
        else:
            overrides.append(word)
    if "gpus" in own:
        overrides += _ranks(own["gpus"], overrides)
    device = read_device(own.get("device", "cpu"))
    total = device.memory_bytes
    if "memory" in own:
        size = size_of(own["memory"])
        if size is None:
            _refuse("memory", own["memory"], "a size has a unit", "write it as memory=80GiB")
            raise AssertionError
        total = size
    search = own.get("search", "true")
    if search not in ("true", "false"):
        _refuse("search", search, "must be true or false", "leave it out to search")
    return PlanRequest(overrides, device, int(ROOM * total), search == "true")


def _ranks(gpus: str, overrides: Sequence[str]) -> list[str]:
    """Returns the override that makes a config one of so many ranks."""
    if not gpus.isdecimal() or not int(gpus):
        _refuse("gpus", gpus, "must be a number of ranks", "use gpus=8")
    count = int(gpus)
    given = {}
    for word in overrides:
        key, _, value = word.partition("=")
        if key in ("parallel.context", "parallel.data"):
            given[key] = value
    if not given:
        return [f"parallel.context={count}"]
    if not all(value.isdecimal() and int(value) for value in given.values()):
        return []  # said by the config itself
    product = 1
    for value in given.values():
        product *= int(value)
    if count % product or (len(given) == 2 and product != count):
        said = " x ".join(f"{key}={value}" for key, value in given.items())
        fact = f"{said} does not divide them" if len(given) == 1 else f"{said} are {product} ranks"
        _refuse("gpus", gpus, fact, f"use gpus={product}, or change one of them")
    if len(given) == 2:
        return []
    missing = "parallel.data" if "parallel.context" in given else "parallel.context"
    return [f"{missing}={count // product}"]


def _config(overrides: Sequence[str], device: Device) -> Config:
    """Composes and checks a config for its own number of ranks, wherever this machine has them.

    Args:
        overrides: of the run.
        device: that it is planned for.

    Raises:
        UserError: lists every fault.
    """
    # It is planned for another machine, whose memory is compared below.
    composed = compose([*overrides, "launch.force=true"])
    faults = composed.faults
    if composed.config is not None:
        ranks = composed.config.parallel.ranks
        faults = check_config(
            composed.config, composed.given, composed.mended, faults, started=ranks, starter="plan"
        )
    faults = _of_device(faults, device)
    if faults or composed.config is None:
        raise UserError("\n".join(faults), BAD_CONFIG)
    return composed.config


def _of_device(faults: list[str], device: Device) -> list[str]:
    """Returns the faults without that which is true of this machine, but not of the device."""
    at_home = [render(as_finding(sentence)) for sentence in (AT_HOME, STATE_AT_HOME)]
    return [fault for fault in faults if device.kind == "cpu" or fault not in at_home]


def _refuse(key: str, value: str, fact: str, remedy: str) -> None:
    raise UserError(render(Finding(key, value, fact, remedy)), BAD_CONFIG)


def _signed(gain: float, size: str) -> str:
    return f"saves {size}" if gain >= 0 else f"costs {size}"


def _sum(sizes: dict[str, int]) -> str:
    return shown(sum(sizes.values()))
