"""The quickstart by the main command under each engine: its loss and its time, on one card."""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

STEPS = 6
WORDS = (
    "experiment=quickstart",
    "parallel.context=1",
    "wandb.mode=disabled",
    "log.plots=false",
    "evaluation.every=0",
    "checkpoint.every=0",
)
HALF = "precision=bfloat16"
CASES = {
    "single": ("engine=single", HALF),
    "fsdp (FSDP2)": ("engine=fsdp", HALF),
    "deepspeed": ("engine=deepspeed", HALF),
    "fsdp, activations on the host": ("engine=fsdp", "engine.offload_activations=true", HALF),
    "fsdp, optimiser on the host": ("engine=fsdp", "engine.offload=optimizer", HALF),
    "fsdp, figures lag a step": ("engine=fsdp", "log.lag=1", HALF),
    "single, float32": ("engine=single", "precision=float32"),
    "single, compiled": ("engine=single", "engine.compile=true", HALF),
}
TOGETHER = 3  # runs at a time
APART = 0.03  # of the last loss, from that of one engine in the same precision


class EngineCheck(NamedTuple):
    """Words of each case, and those of all."""

    cases: dict[str, tuple[str, ...]]
    words: tuple[str, ...]


def prepare(dry: bool) -> EngineCheck:
    """Returns the cases; DeepSpeed where it is installed."""
    if dry:
        tiny = ("steps=2", "model.width=16", "model.layers=1", "model.heads=2", "model.kv_heads=1")
        length = ("context_length=64", "batch_tokens=64", "evaluation.sample_tokens=0")
        small = {"single": ("engine=single",), "single, figures lag": ("log.lag=1",)}
        return EngineCheck(small, (*WORDS, *tiny, *length))
    cases = dict(CASES)
    if importlib.util.find_spec("deepspeed") is None:
        cases.pop("deepspeed")
    return EngineCheck(cases, (*WORDS, f"steps={STEPS}", "evaluation.sample_tokens=0"))


def check(prepared: EngineCheck, seconds: float) -> Iterator[dict[str, Any]]:
    """Yields a row for each engine as it ends."""
    deadline = time.monotonic() + seconds
    first: float | None = None
    waiting = dict(prepared.cases)
    running: list[_Running] = []
    ended: list[_Running] = []
    with tempfile.TemporaryDirectory() as folder:
        while (waiting or running or ended) and time.monotonic() < deadline:
            while waiting and len(running) < TOGETHER:
                name = next(iter(waiting))
                words = (*prepared.words, *waiting.pop(name))
                running.append(_Running(name, words, Path(folder) / str(len(waiting))))
            ended += [each for each in running if each.process.poll() is not None]
            running = [each for each in running if each.process.poll() is None]
            # All are compared with the first of the cases.
            for each in list(ended):
                if first is not None or each.name == next(iter(prepared.cases)):
                    ended.remove(each)
                    row = each.row(first)
                    first = row.get("last loss", 0.0) if first is None else first
                    yield row
            time.sleep(0.1)
        for each in running:
            each.process.kill()
            each.process.wait()
        late = [*(each.name for each in running), *waiting]
        for name in late:
            yield {"engine": name, "passed": False, "error": "not ended in time"}


class _Running:
    """A run of the main command."""

    def __init__(self, name: str, words: tuple[str, ...], folder: Path):
        self.name = name
        self.folder = folder
        self.began = time.monotonic()
        self.output = folder.with_suffix(".txt").open("w+")
        command = [sys.executable, "-m", "trainer", *words, f"run_dir={folder}"]
        self.process = subprocess.Popen(command, stdout=self.output, stderr=subprocess.STDOUT)

    def row(self, first: float | None) -> dict[str, Any]:
        """Returns the row of a run that has ended.

        Args:
            first: loss that its last one is compared with.
        """
        self.output.seek(0)
        said = self.output.read()
        print(said)
        metrics = self.folder / "metrics.jsonl"
        code = self.process.returncode
        if code != 0 or not metrics.exists():
            return {"engine": self.name, "passed": False, "error": f"{code}: {said[-600:]}"}
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        rows = [row for row in rows if row.get("loss") is not None]
        last = rows[-1]
        fine = first is None or abs(last["loss"] - first) <= APART * first
        remark = [line for line in said.splitlines() if line.startswith("engine.compile:")]
        return {
            "engine": self.name,
            "steps": len(rows),
            "first loss": rows[0]["loss"],
            "last loss": last["loss"],
            "step, s": last["step_seconds"],
            "whole command, s": round(time.monotonic() - self.began, 1),
            "remark": " ".join(remark),
            "passed": fine,
        }
