"""What the fuzzer tries: random runs over everything that the configs offer, and settings that somebody may have mistyped."""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, get_args

from trainer.compose import CONF, choices, known_keys
from trainer.config import Config, Parallel
from trainer.reach import fitting

SMALL = (
    "steps=3",
    "model.layers=2",
    "optim.learning_rate=0.003",
    "schedule.warmup_steps=1",
    "checkpoint.every=0",
    "wandb.mode=disabled",
    "launch.oversubscribe=true",
    "launch.timeout_s=40",
)
LENGTHS = (1, 2, 3, 5, 8, 13, 16, 24, 33, 48, 64)
LARGEST_CREW = 4
OF_TOKENS = {  # settings that count tokens, at the sizes of these runs: by the group's option
    "memory=segments": ("memory.length=5", "memory.segment=null"),
    "memory=tokens": ("memory.length=2", "memory.segment=7"),
    "memory=lookup": ("memory.length=9", "memory.count=3"),
}
GROUPS = ("model", "mixer", "position", "memory", "data", "engine", "launch", "optim", "schedule", "experiment")
MISUSES = ("=", "a=b=c", "steps", "steps=", "=3", "steps=3,4", "--steps", "steps = 3", "hydra.run.dir=/", "\n", "@x=1")
STRANGE = (
    "null", "true", "false", "0", "-1", "1", "2", "3.5", "-0.0", "1e30", "1e400", "nan", "inf", "-inf", "abc", "''", "[]", "{}",
    "[1,2]", "[abc]", "{a:1}", "9223372036854775808", "99999999999999999999999999", "1e-30", "0.1", "none", "x" * 300, "auto",
    "'a b'", "/nowhere/at/all", "../..", "50%", "ünï", "'$HOME'", "1_000", "0x10", "1e3", "2024_11_27",
)  # fmt: skip


def options(group: str) -> list[str]:
    """What a group of the config offers."""
    return [name for name in choices(group) if name]


def import_parts() -> None:
    """Import the modules of all that the configs offer, so that what is forked has them, and all from the same day."""
    for group in ("model", "mixer", "position", "memory", "data", "optim", "schedule", "engine"):
        for target in re.findall(r"_target_: ([\w.]+)", _texts(group)):
            importlib.import_module(target.rpartition(".")[0])


def _texts(group: str) -> str:
    """All yamls of a group."""
    return "\n".join(path.read_text("utf-8") for path in sorted((CONF / group).glob("*.yaml")))


def words_of(kind: str) -> tuple[Any, ...]:
    """The words that a setting of `parallel` may have."""
    return get_args(Parallel.model_fields[kind].annotation)


def draw_run(random: Random, folder: Path, documents: str) -> tuple[list[str], list[str], int]:
    """(settings of both runs, settings of the one that is spread, its ranks)."""
    context = random.choice((1, 2, 2, 3, 3, 4))
    data = random.choice([n for n in (1, 1, 2, 3) if n * context <= LARGEST_CREW])
    length = random.choice(LENGTHS)
    heads = random.choice((1, 2, 4))
    common = [*SMALL, f"seed={random.randrange(1000)}", f"model.width={heads * random.choice((4, 8))}", f"model.heads={heads}"]
    common += [f"context_length={length}", f"batch_tokens={length * random.choice((1, 2, 3, 5))}"]
    common.append(f"model.kv_heads={random.choice([n for n in (1, 2, 4) if heads % n == 0])}")
    common.append(f"precision={random.choices(('float64', 'float32', 'bfloat16'), (18, 1, 1))[0]}")
    if random.random() < 0.8:
        common.append(f"mixer={random.choice(options('mixer'))}")
    else:
        common.append(f"model={random.choice(options('model'))}")
    if random.random() < 0.6:
        common.append(f"position={random.choice(options('position'))}")
    if random.random() < 0.4:
        memory = f"memory={random.choice(options('memory'))}"
        common += [memory, *OF_TOKENS.get(memory, ())]
    if random.random() < 0.85:
        common += ["data=files", f"data.path={documents}", f"data.cache={folder / 'cache'}"]
    else:
        common.append(f"data={random.choice([name for name in options('data') if name not in ('files', 'hub', 'stdlib')])}")
    evaluates = random.random() < 0.25
    common += ["evaluation.every=3", "evaluation.batches=1"] if evaluates else ["evaluation.every=0"]
    return fitting(common), _spread(random, context, data), context * data


def _spread(random: Random, context: int, data: int) -> list[str]:
    spread = [f"parallel.context={context}", f"parallel.data={data}"]
    method = random.choice(words_of("method"))
    if context > 1:
        spread += [f"parallel.method={method}", f"parallel.layout={random.choice(words_of('layout'))}"]
    if method == "usp" and context > 1:
        inner = random.choice([n for n in (1, 2, 3, 4) if context % n == 0])
        key = "ulysses" if "ulysses" in Parallel.model_fields else "heads"
        spread += [f"parallel.{key}={inner}", f"parallel.ring={context // inner}"]
    if random.random() < 0.4:
        spread.append(f"parallel.micro_batch={random.choice((1, 2))}")
    engine = random.choices(("single", "fsdp", "deepspeed"), (4, 4, 1))[0]
    spread.append(f"engine={engine}")
    if engine == "deepspeed":
        key = "zero_stage" if "zero_stage" in Config.model_fields["engine"].annotation.model_fields else "zero"  # type: ignore[union-attr]
        spread.append(f"engine.{key}={random.randrange(4)}")
    if random.random() < 0.2:
        spread.append(f"engine.checkpointing={random.choice(('full', 'selective'))}")
    return spread


def draw_mistakes(random: Random, base: Sequence[str]) -> list[str]:
    """A run's settings with one or two of them mistyped."""
    words = list(base)
    for _ in range(random.choice((1, 1, 2))):
        words += _mistake(random)
    return words


def _mistake(random: Random) -> list[str]:
    kind = random.random()
    keys = sorted(key for key in known_keys() if key not in ("run_dir", "name"))
    key = random.choice(keys)
    if kind < 0.55:
        return [f"{key}={random.choice(STRANGE)}"]
    if kind < 0.75:  # a setting of a node, of a part that is chosen for it
        group = random.choice(("mixer", "position", "memory", "optim", "schedule"))
        part = random.choice([name for name in options(group) if name != "none"])
        node = random.choice(_settings(group, part) or ["length"])
        return [f"{group}={part}", f"{group}.{node}={random.choice(STRANGE)}"]
    if kind < 0.85:
        return [random.choice((key[:-1], key + "x", key.replace(".", ""), f"+{key}", f"~{key}", key.upper())) + "=1"]
    if kind < 0.93:
        return [f"{random.choice(GROUPS)}={random.choice(STRANGE)}"]
    return [random.choice(MISUSES)]


def _settings(group: str, part: str) -> list[str]:
    """The settings that the yaml of a part lists."""
    text = (CONF / group / f"{part}.yaml").read_text("utf-8")
    rows = [line for line in text.splitlines() if line[:1].isalpha() and ":" in line]
    return [line.partition(":")[0] for line in rows]
