"""Random runs over everything that the configs offer, most of them valid: the parts themselves say
what fits them."""

import importlib
import re
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, get_args

from omegaconf import OmegaConf

from models.attention.full import Attention
from models.memory.local_attention import NOT_EXACT
from trainer.config.groups import CONF, choices
from trainer.config.node_checks import find_class, parameters
from trainer.config.schema import EngineConfig, ParallelConfig
from trainer.config.values import TARGET
from trainer.data.sources.base import build_source

SMALL = (
    "steps=3",
    "model.layers=2",
    "optim.learning_rate=0.003",
    "schedule.warmup_steps=1",
    "checkpoint.every=0",
    "wandb.mode=disabled",
    "launch.oversubscribe=true",
    "launch.timeout_s=150",
)
LENGTHS = (1, 2, 3, 5, 8, 13, 16, 24, 33, 48, 64)
LARGEST_CREW = 4
SIZES = (1, 2, 3, 4, 5, 8)  # of windows, blocks and the like: shorter than a row, or longer
LOCAL = ("segments", "lookup", "compressive")  # memories that stand beside the heads of attention
DISCRETE = (
    "switch",
    "moe_topk",
    "compressed",
    "lsh",
    "lookup",
)  # they choose: where rounding differs, other things
SMOOTH = (  # Adam's steps are then no signs, that turn with the last bit of a small gradient
    "optim.eps=0.001"
)
TEXT = ("files", "hub", "stdlib")
LATER = (  # what a run imports on its way
    "matplotlib.backends.backend_agg",
    "torch._inductor.compile_fx",
    "torch.profiler",
    "deepspeed.inference.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
)


class Draw(NamedTuple):
    """A random run: the settings that one rank has too, those of the run that is spread, and its
    ranks."""

    common: list[str]
    spread: list[str]
    ranks: int


def options(group: str) -> list[str]:
    """What a group of the config offers."""
    return [name for name in choices(group) if name]


def import_parts() -> None:
    """Import the modules of all that the configs offer, so that what is forked has them, and all
    from the same day."""
    for group in (
        "model",
        "mixer",
        "position",
        "memory",
        "data",
        "objective",
        "optim",
        "schedule",
        "engine",
    ):
        for path in sorted((CONF / group).glob("*.yaml")):
            for target in re.findall(r"_target_: ([\w.]+)", path.read_text("utf-8")):
                importlib.import_module(target.rpartition(".")[0])
    for name in LATER:
        importlib.import_module(name)


@cache
def part(group: str, name: str) -> dict[str, Any]:
    """What the yaml of an option says, its class among it."""
    return OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))  # type: ignore[return-value]


def kind_of(group: str, name: str) -> type:
    """The class that an option names."""
    return find_class(part(group, name)[TARGET], group)


def settings_of(group: str, name: str) -> dict[str, Any]:
    """The settings that the yaml of an option lists, with their values."""
    return {
        key: value
        for key, value in part(group, name).items()
        if key not in (TARGET, "name", "defaults")
    }


def words_of(kind: str) -> tuple[Any, ...]:
    """The words that a setting of `parallel` may have."""
    return get_args(ParallelConfig.model_fields[kind].annotation)


def _either(kind: type, *names: str) -> str:
    return next(name for name in names if name in kind.model_fields)  # type: ignore[attr-defined]


def draw_run(random: Random, folder: Path, documents: str) -> Draw:
    """A run over as many ranks as it says; `documents`: a glob of texts."""
    context = random.choice((1, 2, 2, 3, 3, 4))
    data = random.choice([n for n in (1, 1, 2, 3) if n * context <= LARGEST_CREW])
    engine = random.choices(("single", "fsdp", "deepspeed"), (4, 4, 2))[0]
    low = engine == "deepspeed" or random.random() < 0.15
    precision = random.choices(("float32", "bfloat16"), (3, 2))[0] if low else "float64"
    memory = random.choice(options("memory")) if random.random() < 0.35 else "none"
    chosen = _layers(random, memory, precision)
    chosen += [f"memory={memory}", *_sized(random, "memory", memory)] if memory != "none" else []
    text = memory != "none" or random.random() < 0.85
    source = (
        "files" if text else random.choice([name for name in options("data") if name not in TEXT])
    )
    length = random.choice(LENGTHS) if text else longest(source) + random.choice((0, 1, 5))
    rows = random.choice((1, 2, 3, 5)) if length < 100 else data
    heads = random.choice((1, 2, 4))
    common = [*SMALL, f"seed={random.randrange(1000)}", f"precision={precision}", *chosen]
    common += [f"model.width={heads * random.choice((4, 8))}", f"model.heads={heads}"]
    common.append(f"model.kv_heads={random.choice([n for n in (1, 2, 4) if heads % n == 0])}")
    common += [f"context_length={length}", f"batch_tokens={length * rows}", f"data={source}"]
    common += [f"data.path={documents}", f"data.cache={folder / 'cache'}"] if text else []
    common += (
        ["evaluation.every=3", "evaluation.batches=1"]
        if random.random() < 0.25
        else ["evaluation.every=0"]
    )
    if low:
        common.append(SMOOTH)
    elif random.random() < 0.1:
        common.append("optim=muon")
    if random.random() < 0.2:
        common.append(f"schedule={random.choice(options('schedule'))}")
    if text and memory == "none":
        common += _objective(random, common, length)
    spread = _ranks(random, context, data, heads)
    if random.random() < 0.4:
        spread.append(
            f"parallel.micro_batch={random.choice([n for n in (1, 2) if n <= -(-rows // data)])}"
        )
    spread += _engine(random, engine, precision, context * data)
    if {"model=switch", "model=moe_topk"} & set(common) and engine != "deepspeed":
        spread += [f"parallel.experts={random.choice((1, context * data))}"]
    return Draw(common, spread, context * data)


@cache
def longest(source: str) -> int:
    """Tokens of a task's longest example."""
    return build_source(part("data", source)).longest  # type: ignore[attr-defined]


def _layers(random: Random, memory: str, precision: str) -> list[str]:
    """The mixer, or the whole model, and a position where the mixer takes one."""
    if memory == "none" and random.random() < 0.2:
        return [
            f"model={random.choice([name for name in options('model') if fits(name, precision)])}"
        ]
    mixers = [name for name in options("mixer") if fits(name, precision)]
    if memory in LOCAL:
        mixers = [name for name in mixers if _beside(kind_of("mixer", name))]
    mixer = random.choice(mixers)
    words = [f"mixer={mixer}", *_sized(random, "mixer", mixer)]
    if "position" in parameters(kind_of("mixer", mixer)) and random.random() < 0.7:
        position = random.choice(
            [name for name in options("position") if memory == "none" or name != "learned"]
        )
        words += [f"position={position}", *_sized(random, "position", position)]
    return words


def fits(name: str, precision: str) -> bool:
    """Whether an option can be compared in a precision."""
    return precision != "bfloat16" or name not in DISCRETE


def _beside(mixer: type) -> bool:
    return issubclass(mixer, Attention) and not issubclass(mixer, tuple(NOT_EXACT))


def _sized(random: Random, group: str, name: str) -> list[str]:
    """The sizes of an option, most of them drawn anew: as they stand they exceed every row of these
    runs."""
    words = []
    for key, value in settings_of(group, name).items():
        if key == "segment":
            words.append(f"{group}.{key}={random.choice(('null', 3, 5, 7))}")
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1:
            if value > max(SIZES) or random.random() < 0.3:
                words.append(f"{group}.{key}={random.choice(SIZES)}")
        elif isinstance(value, bool) and random.random() < 0.1 and key not in ("symmetric", "both"):
            words.append(f"{group}.{key}={str(not value).lower()}")
    return words


def _objective(random: Random, common: list[str], length: int) -> list[str]:
    if {"mixer=bidirectional", "model=bidirectional"} & set(common):
        return ["objective=masked"]
    if random.random() < 0.1:
        names = [name for name in options("objective") if name != "span_corruption" or length > 8]
        return [f"objective={random.choice(names)}"]
    return []


def _ranks(random: Random, context: int, data: int, heads: int) -> list[str]:
    """How the sequence and the rows are spread."""
    spread = [f"parallel.context={context}", f"parallel.data={data}"]
    if context == 1:
        return spread
    divided = _either(ParallelConfig, "ulysses", "heads")
    method = random.choice(
        [word for word in words_of("method") if word != divided or context <= heads]
    )
    spread += [f"parallel.method={method}", f"parallel.layout={random.choice(words_of('layout'))}"]
    if method == "usp":
        inner = random.choice([n for n in (1, 2, 3, 4) if context % n == 0 and n <= heads])
        spread += [f"parallel.{divided}={inner}", f"parallel.ring={context // inner}"]
    return spread


def _engine(random: Random, engine: str, precision: str, ranks: int) -> list[str]:
    spread = [f"engine={engine}"]
    if engine == "deepspeed":
        stage = random.choice([n for n in range(4) if n or precision != "bfloat16"])
        spread.append(f"engine.{_either(EngineConfig, 'zero_stage', 'zero')}={stage}")
    if engine == "fsdp" and random.random() < 0.3:
        spread.append(
            random.choice(("engine.reshard_after_forward=false", f"engine.replicate={ranks}"))
        )
    if random.random() < 0.2:
        spread.append(f"engine.checkpointing={random.choice(('full', 'selective'))}")
    return spread
