"""Folders of runs, written by hand: what a sweep of four variants and three seeds leaves, in
whatever state."""

import json
import math
from pathlib import Path

import yaml

from trainer.sweep.jobs import JobOutcome

STEPS, TOKENS = 40, 4096


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def trained(
    place: Path,
    level: float,
    *,
    until: int = STEPS,
    seconds: float = 0.5,
    memory: int = 2**30,
    flops: float = 1e6,
) -> None:
    """A run that came down from 5.5 to about `level` nats, evaluated every 20 steps."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.yaml").write_text(yaml.safe_dump({"name": "sweep", "steps": STEPS}))
    facts = {
        "parameters": 123_456,
        "flops_per_token": flops,
        "ranks": 2,
        "sent_bytes_per_step": 7_340_032,
    }
    (place / "summary.json").write_text(json.dumps(facts))

    def span(step: int) -> float:
        return level + (5.5 - level) * math.exp(-step / 8)

    always = {
        "tokens_per_second": TOKENS / seconds,
        "step_seconds": seconds,
        "peak_memory_bytes": memory,
    }
    steps = range(1, until + 1)
    lines(
        place / "metrics.jsonl",
        [{"step": s, "loss": span(s), "tokens": TOKENS * s, **always} for s in steps],
    )
    bars = [
        {"begin": 2**b // 2, "end": 2**b, "loss": level + 0.6 - b / 20, "tokens": 9}
        for b in range(10)
    ]
    held_out = {"name": "held_out_loss", "by_position": bars}
    evaluations = [{"step": s, "value": span(s) + 0.1, **held_out} for s in steps if s % 20 == 0]
    lines(
        place / "evaluation.jsonl", [*evaluations, {"step": until, "name": "recall", "value": 0.25}]
    )


def sweep(place: Path) -> Path:
    """Three seeds of full, sliding, retnet and hyena: one of sliding failed, one of hyena goes on,
    one has not begun."""
    place.mkdir()
    (place / "sweep.json").write_text('{"settings": []}')
    models = {
        "full": (2.0, 0.5, 4e6),
        "sliding": (2.2, 0.3, 3e6),
        "retnet": (2.4, 0.4, 3.5e6),
        "hyena": (2.6, 0.6, 2e6),
    }
    for number in range(12):
        model, seed = [*models][number // 3], number % 3 + 1
        level, seconds, flops = models[model]
        settings = ["++steps=40", f"model={model}", f"++seed={seed}"]
        job = place / str(number)
        if number == 11:
            job.mkdir()
            continue
        until = 12 if number == 4 else 25 if number == 10 else STEPS
        trained(job, level + 0.05 * (seed - 2), until=until, seconds=seconds, flops=flops)
        if number == 10:
            words = ["steps=40", "model=hyena", "seed=2", "run_dir='x'", "wandb.group=all"]
            command = ["trainer/__main__.py", "--job-of", "7", *words]
            (job / "environment.json").write_text(json.dumps({"command": command}))
        elif number == 4:
            JobOutcome(settings, "failed", 3, 9.0, "the disk <is> full").write(job)
        else:
            JobOutcome(settings, "done", 0, 20.0).write(job)
    return place
