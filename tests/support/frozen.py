"""Writes the losses of 30 steps in float64 for one config of every family, on one rank and on
several.

    python -m tests.support.frozen OUT.json [ONLY ...]      train and write
    python -m tests.support.frozen --compare A.json B.json  the largest difference

A change that only moves or renames leaves every figure equal to the last bit; a change of code,
within 1e-12.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from tests.support.pool import ranks
from trainer import stages
from trainer.config.compose import compose
from trainer.launch.elastic import RankInfo
from trainer.logs.jsonl import METRICS, read
from trainer.run_dir import make_run_dir
from trainer.verify.whole_runs import write_documents

COMMON = (
    "steps=30",
    "context_length=48",
    "batch_tokens=192",
    "model.width=32",
    "model.layers=2",
    "model.heads=4",
    "optim.learning_rate=0.003",
    "schedule.warmup_steps=5",
    "checkpoint.every=0",
    "evaluation.every=0",
    "wandb.mode=disabled",
    "log.plots=false",
    "precision=float64",
)
ONE = ("engine=single",)


def shared(method: str, *more: str) -> tuple[str, ...]:
    """Overrides that share every row over three ranks."""
    return ("parallel.context=3", f"parallel.method={method}", "engine=fsdp", *more)


GRID = (
    "parallel.context=4",
    "parallel.method=usp",
    "parallel.ulysses=2",
    "parallel.ring=2",
    "engine=fsdp",
)
CASES: dict[
    str, tuple[tuple[str, ...], tuple[str, ...], int]
] = {  # overrides, how they are shared, ranks
    "full": (("model=full",), shared("ring"), 3),
    "full_usp": (("model=full",), GRID, 4),
    "sliding": (("model=sliding",), shared("allgather"), 3),
    "latent": (("model=latent",), shared("ulysses"), 3),
    "longformer": (("model=longformer",), shared("ring", "parallel.layout=contiguous"), 3),
    "compressed": (("model=compressed",), shared("ring"), 3),
    "lsh": (("model=lsh",), shared("ring"), 3),
    "retention": (("model=retention",), shared("auto"), 3),
    "rwkv7": (("model=rwkv7",), shared("auto", "parallel.layout=balanced"), 3),
    "gated_delta": (("model=gated_delta",), shared("auto"), 3),
    "mamba2": (("model=mamba2",), shared("auto"), 3),
    "hyena": (("model=hyena",), shared("auto"), 3),
    "hybrid": (("model=hybrid", "model.layers=4"), shared("ring"), 3),
    "switch": (("model=switch",), shared("ring"), 3),
    "segments": (
        ("memory=segments", "memory.length=40", "memory.segment=16", "position=relative"),
        shared("ring"),
        3,
    ),
    "compressive": (("memory=compressive", "memory.segment=16"), shared("ring"), 3),
    "ntm": (
        ("model=ntm", "data=copy", "model.slots=16", "model.layers=1", "model.heads=1"),
        ("engine=single",),
        1,
    ),
}


def train(env, words: tuple[str, ...], directory: str) -> None:
    """Be one rank of a run; called in a pool that has imported everything."""
    composed = compose(words)
    assert composed.config is not None and not composed.faults, composed.faults
    rank = RankInfo(env.rank, env.size, env.rank, env.size, torch.device("cpu"), "gloo")
    assert stages.run(composed.config, rank, Path(directory)) == 0


def losses(name: str, folder: Path) -> dict[str, list[float]]:
    """The losses of a case, by number of ranks."""
    overrides, sharing, size = CASES[name]
    documents = (
        "data=files",
        f"data.path={write_documents(folder / 'text')}",
        f"data.cache={folder / 'cache'}",
    )
    data = () if any(word.startswith("data=") for word in overrides) else documents
    result = {}
    for count, way in ((1, ONE), (size, sharing)):
        if str(count) in result:
            continue
        directory = folder / f"{name}_{count}"
        make_run_dir(directory)
        ranks(
            count, train, (*COMMON, *data, *overrides, *way, f"run_dir={directory}"), str(directory)
        )
        result[str(count)] = [row["loss"] for row in read(directory / METRICS)]
    return result


def compare(before: dict, after: dict) -> float:
    """Print each case's largest relative difference; returns the largest of all."""
    worst = 0.0
    for name, by_ranks in before.items():
        for size, old in by_ranks.items():
            new = after[name][size]
            assert len(new) == len(old), f"{name} on {size} ranks: {len(new)} steps, not {len(old)}"
            difference = max(abs(a - b) / abs(a) for a, b in zip(old, new))
            print(f"{name:12} {size} ranks  {difference:.1e}")
            worst = max(worst, difference)
    return worst


def main(words: list[str]) -> None:
    """Train and write, or compare."""
    if words[:1] == ["--compare"]:
        before, after = (json.loads(Path(path).read_text()) for path in words[1:])
        print(f"largest difference {compare(before, after):.1e}")
        return
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in words[1:] or CASES:
            out[name] = losses(name, Path(folder))
            print(name, {size: values[-1] for size, values in out[name].items()}, flush=True)
            Path(words[0]).write_text(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1:])
