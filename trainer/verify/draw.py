"""Draws random runs over everything that the configs offer, most of them valid.

The parts themselves say what fits them, so that a new option is drawn without an entry here.
"""

import importlib
import re
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, get_args

from omegaconf import OmegaConf

from models.attention.full import Attention
from models.layer import Layer
from trainer.config.groups import CONF, choices
from trainer.config.node_checks import find_class, parameters
from trainer.config.schema import ParallelConfig
from trainer.config.values import TARGET
from trainer.data.sources.base import build_source
from trainer.data.tasks.base import SyntheticTask

SMALL = (
    "steps=3",
    "model.layers=2",
    "optim.learning_rate=0.003",
    "schedule.warmup_steps=1",
    "checkpoint.every=0",
    "wandb.mode=disabled",
    "log.plots=false",
    "launch.oversubscribe=true",
    "launch.timeout_s=150",
)
LENGTHS = (1, 2, 3, 5, 8, 13, 16, 24, 33, 48, 64)
TWO_STREAMS = ("encoder_decoder", "seq2seq", "t5", "transformer")
OF_PAIRS = "reverse"  # data that they read, and that no other model does
LONG = 100  # tokens: above it a step takes only as many rows as there are data ranks
LARGEST_CREW = 4
SIZES = (1, 2, 3, 4, 5, 8)  # of windows, blocks and the like: shorter than a row, or longer
LOCAL = ("segments", "lookup", "compressive")  # memories that attention layers carry
# Options that make discrete choices: where rounding differs, they choose differently.
DISCRETE = ("switch", "moe_topk", "compressed", "lsh", "lookup")
# With a large epsilon Adam's steps are not signs, which the last bit of a small gradient flips.
SMOOTH = "optim.eps=0.001"
# Settings of a boolean kind that decide which model it is, and not how it is computed.
FIXED_FLAGS = ("symmetric", "both")
GROUPS = (
    "model",
    "mixer",
    "position",
    "memory",
    "data",
    "objective",
    "optim",
    "schedule",
    "engine",
)
# Modules that a run imports on its way; imported once, before ranks are forked.
LAZY_IMPORTS = (
    "matplotlib.backends.backend_agg",
    "torch._inductor.compile_fx",
    "torch.profiler",
    "deepspeed.inference.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
)


class Draw(NamedTuple):
    """A random run.

    Attributes:
        common: settings that the run on one rank has as well.
        spread: settings of the ranks and the engine.
        ranks: number of ranks.
    """

    common: list[str]
    spread: list[str]
    ranks: int


def options(group: str) -> list[str]:
    """Returns the options of a config group."""
    return [name for name in choices(group) if name]


def complete(group: str) -> list[str]:
    """Returns the options that need nothing from the user, such as a folder of weights."""
    return [name for name in options(group) if "???" not in part(group, name).values()]


@cache
def tasks() -> list[str]:
    """Returns the sources that make their own data, of one stream."""
    return [
        name
        for name in options("data")
        if name != OF_PAIRS and issubclass(class_of("data", name), SyntheticTask)
    ]


def import_parts() -> None:
    """Imports the modules of all options.

    Forked ranks then share them, and a source file that changes meanwhile does no harm.
    """
    for group in GROUPS:
        for path in sorted((CONF / group).glob("*.yaml")):
            for target in re.findall(r"_target_: ([\w.]+)", path.read_text("utf-8")):
                importlib.import_module(target.rpartition(".")[0])
    for name in LAZY_IMPORTS:
        importlib.import_module(name)


@cache
def part(group: str, name: str) -> dict[str, Any]:
    """Returns the yaml of an option as a dictionary, its class included."""
    return OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))  # type: ignore[return-value]


def class_of(group: str, name: str) -> type:
    """Returns the class that an option names."""
    return find_class(part(group, name)[TARGET], group)


def settings_of(group: str, name: str) -> dict[str, Any]:
    """Returns the settings that the yaml of an option lists, with their values."""
    settings = {}
    for key, value in part(group, name).items():
        if key not in (TARGET, "name", "defaults"):
            settings[key] = value
    return settings


def parallel_choices(key: str) -> tuple[Any, ...]:
    """Returns the words that a setting of `parallel` accepts."""
    return get_args(ParallelConfig.model_fields[key].annotation)


def draw_run(random: Random, folder: Path, documents: str) -> Draw:
    """Draws a run.

    The order of the calls of `random` is part of a case: changing it changes what a seed draws.

    Args:
        random: seeded for this case.
        folder: receives the cache of data.
        documents: a glob of text files.
    """
    context = random.choice((1, 2, 2, 3, 3, 4))
    possible = [ranks for ranks in (1, 1, 2, 3) if ranks * context <= LARGEST_CREW]
    data = random.choice(possible)
    engine = random.choices(("single", "fsdp", "deepspeed"), (4, 4, 2))[0]
    low_precision = engine == "deepspeed" or random.random() < 0.15
    precision = "float64"
    if low_precision:
        precision = random.choices(("float32", "bfloat16"), (3, 2))[0]
    memory = "none"
    if random.random() < 0.35:
        memory = random.choice(options("memory"))
    parts = _layers(random, memory, precision)
    if memory != "none":
        parts += [f"memory={memory}", *_sizes(random, "memory", memory)]
    # A memory carries documents on from row to row, which tasks do not have.
    is_text = memory != "none" or random.random() < 0.85
    if is_text:
        source = "files"
        length = random.choice(LENGTHS)
    else:
        source = random.choice(tasks())
        length = longest(source) + random.choice((0, 1, 5))
    if any(f"model={name}" in parts for name in TWO_STREAMS):
        is_text = False
        source = OF_PAIRS
        length = max(length, longest(source))
    rows = random.choice((1, 2, 3, 5)) if length < LONG else data
    heads = random.choice((1, 2, 4))
    common = [*SMALL, f"seed={random.randrange(1000)}", f"precision={precision}", *parts]
    common += [f"model.width={heads * random.choice((4, 8))}", f"model.heads={heads}"]
    common.append(f"model.kv_heads={random.choice([n for n in (1, 2, 4) if heads % n == 0])}")
    common += [f"context_length={length}", f"batch_tokens={length * rows}", f"data={source}"]
    if is_text:
        common += [f"data.path={documents}", f"data.cache={folder / 'cache'}"]
    common += _evaluation(random)
    if low_precision:
        common.append(SMOOTH)
    elif random.random() < 0.1:
        common.append("optim=muon")
    if random.random() < 0.2:
        common.append(f"schedule={random.choice(options('schedule'))}")
    if is_text and memory == "none":
        common += _objective(random, common, length)

    spread = _ranks(random, context, data, heads)
    spread += _micro_batch(random, -(-rows // data))
    ranks = context * data
    spread += _engine(random, engine, precision, ranks)
    spread += _experts(random, common, engine, ranks)
    return Draw(common, spread, ranks)


def _evaluation(random: Random) -> list[str]:
    """Draws whether the run is evaluated while it trains."""
    if random.random() < 0.25:
        return ["evaluation.every=3", "evaluation.batches=1"]
    return ["evaluation.every=0"]


def _micro_batch(random: Random, rows_per_rank: int) -> list[str]:
    """Draws the rows of a forward pass; most runs leave them to the default."""
    if random.random() < 0.4:
        sizes = [size for size in (1, 2) if size <= rows_per_rank]
        return [f"parallel.micro_batch={random.choice(sizes)}"]
    return []


def _experts(random: Random, common: list[str], engine: str, ranks: int) -> list[str]:
    """Draws the ranks of experts, when the model has any and the engine can share them."""
    has_experts = "model=switch" in common or "model=moe_topk" in common
    if has_experts and engine != "deepspeed":
        return [f"parallel.experts={random.choice((1, ranks))}"]
    return []


@cache
def longest(source: str) -> int:
    """Returns the tokens of a task's longest example."""
    return build_source(part("data", source)).longest  # type: ignore[attr-defined]


def _layers(random: Random, memory: str, precision: str) -> list[str]:
    """Draws a whole model, or a mixer with a position when it takes one."""
    if memory == "none" and random.random() < 0.2:
        models = [name for name in complete("model") if is_comparable(name, precision)]
        return [f"model={random.choice(models)}"]
    mixers = [name for name in options("mixer") if is_comparable(name, precision)]
    if memory in LOCAL:
        mixers = [name for name in mixers if _carries_memory(class_of("mixer", name))]
    mixer = random.choice(mixers)
    words = [f"mixer={mixer}", *_sizes(random, "mixer", mixer)]
    if "position" in parameters(class_of("mixer", mixer)) and random.random() < 0.7:
        positions = options("position")
        if memory != "none":
            # A learned table ends, while positions go on from row to row.
            positions = [name for name in positions if name != "learned"]
        position = random.choice(positions)
        words += [f"position={position}", *_sizes(random, "position", position)]
    return words


def is_comparable(name: str, precision: str) -> bool:
    """Reports that runs of an option agree within rounding in this precision."""
    return precision != "bfloat16" or name not in DISCRETE


def _carries_memory(mixer: type) -> bool:
    # A mixer that states a reason against it overrides this hook.
    return issubclass(mixer, Attention) and mixer.stays_local is Layer.stays_local


def _sizes(random: Random, group: str, name: str) -> list[str]:
    """Draws the sizes of an option; most defaults exceed every row of these runs."""
    words = []
    for key, value in settings_of(group, name).items():
        # bool is a subclass of int, and a flag is not a size.
        is_flag = isinstance(value, bool)
        if key == "segment":
            words.append(f"{group}.{key}={random.choice(('null', 3, 5, 7))}")
        elif isinstance(value, int) and not is_flag and value > 1:
            if value > max(SIZES) or random.random() < 0.3:
                words.append(f"{group}.{key}={random.choice(SIZES)}")
        elif is_flag and random.random() < 0.1 and key not in FIXED_FLAGS:
            words.append(f"{group}.{key}={str(not value).lower()}")
    return words


def _objective(random: Random, common: list[str], length: int) -> list[str]:
    """Draws an objective; a bidirectional model only trains with a masked one."""
    if "mixer=bidirectional" in common or "model=bidirectional" in common:
        return ["objective=masked"]
    if random.random() < 0.1:
        names = options("objective")
        if length <= 8:
            # Too short for a span and its sentinels.
            names = [name for name in names if name != "span_corruption"]
        return [f"objective={random.choice(names)}"]
    return []


def _ranks(random: Random, context: int, data: int, heads: int) -> list[str]:
    """Draws how the sequence and the rows are spread."""
    spread = [f"parallel.context={context}", f"parallel.data={data}"]
    if context == 1:
        return spread
    methods = []
    for name in parallel_choices("method"):
        if name != "ulysses" or context <= heads:
            methods.append(name)
    method = random.choice(methods)
    layout = random.choice(parallel_choices("layout"))
    spread += [f"parallel.method={method}", f"parallel.layout={layout}"]
    if method == "usp":
        divisors = [size for size in (1, 2, 3, 4) if context % size == 0 and size <= heads]
        inner = random.choice(divisors)
        spread += [f"parallel.ulysses={inner}", f"parallel.ring={context // inner}"]
    return spread


def _engine(random: Random, engine: str, precision: str, ranks: int) -> list[str]:
    """Draws an engine's settings."""
    spread = [f"engine={engine}"]
    if engine == "deepspeed":
        # Stage 0 of DeepSpeed keeps no float32 copy of bfloat16 weights.
        stages = range(4) if precision != "bfloat16" else range(1, 4)
        spread.append(f"engine.zero_stage={random.choice(list(stages))}")
    if engine == "fsdp" and random.random() < 0.3:
        settings = ("engine.reshard_after_forward=false", f"engine.replicate={ranks}")
        spread.append(random.choice(settings))
    if random.random() < 0.2:
        spread.append(f"engine.checkpointing={random.choice(('full', 'selective'))}")
    return spread
