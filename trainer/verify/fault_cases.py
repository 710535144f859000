"""Faults other than a killed launcher: ranks, signals, checkpoints, disk, data and network.

Every case takes a FaultInjection, disturbs a run of its own there, and returns a line of the table.
"""

import json
import resource
import signal
import time
from collections.abc import Iterator

from trainer.errors import BAD_CONFIG, BAD_RUN, DONE
from trainer.logs.jsonl import METRICS, read
from trainer.run_dir import SCRATCH
from trainer.verify.fault_injection import (
    LOST_SINCE_CHECKPOINT,
    MOMENTS,
    RANKS,
    FaultInjection,
    FaultOutcome,
)
from trainer.watchdog import read_heartbeats

TERMINATED = 143  # exit status of a run that SIGTERM ended after a save
FILE_LIMIT_BYTES = 150_000  # below the size of a checkpoint shard, above that of every log


def rank_killed(injection: FaultInjection) -> FaultOutcome:
    """Kills one rank of a run that may restart its ranks."""
    name = "rank killed"
    process = injection.start(name, "launch.max_restarts=2")
    injection.wait_for(name, process, MOMENTS["a step"], 5)
    injection.ranks(process)[1].kill()
    began = time.monotonic()
    # Notes of the second start have a folder of their own; the first one says that it works again.
    second_start = injection.folder / name / SCRATCH / "watch_1"
    while process.poll() is None:
        note = read_heartbeats(second_start, 1)[0]
        if note and note.passed:
            break
        time.sleep(0.01)
    seconds = time.monotonic() - began
    ended = injection.end(name, process)
    as_promised = injection.matches(name, ended) and "started again" in ended.output
    fault = "a rank is killed, launch.max_restarts=2"
    shown = f"all ranks go on from the last checkpoint, after {seconds:.1f} s"
    return FaultOutcome(fault, shown, LOST_SINCE_CHECKPOINT, as_promised)


def rank_stopped(injection: FaultInjection) -> FaultOutcome:
    """Suspends one rank of a run that may not restart."""
    name = "rank stopped"
    process = injection.start(name, "launch.timeout_s=5", "launch.grace_s=1")
    injection.wait_for(name, process, MOMENTS["a step"], 5)
    injection.ranks(process)[1].suspend()
    ended = injection.end(name, process)
    reported = ended.code == BAD_RUN and f"rank 1 of {RANKS} stands still" in ended.output
    as_promised = reported and injection.finishes(name)
    reason = ended.line("launch.timeout_s").partition(": ")[2].partition(";")[0]
    shown = f"exit status {ended.code}: {reason}"
    return FaultOutcome("a rank hangs (SIGSTOP)", shown, LOST_SINCE_CHECKPOINT, as_promised)


def rank_stopped_once(injection: FaultInjection) -> FaultOutcome:
    """Suspends one rank of a run that may restart its ranks."""
    name = "rank stopped once"
    overrides = ("launch.timeout_s=5", "launch.grace_s=1", "launch.max_restarts=1")
    process = injection.start(name, *overrides)
    injection.wait_for(name, process, MOMENTS["a step"], 5)
    injection.ranks(process)[1].suspend()
    ended = injection.end(name, process)
    as_promised = injection.matches(name, ended) and "started again" in ended.output
    shown = ended.output[-300:]
    if as_promised:
        shown = "which rank it was; all ranks go on from the last checkpoint"
    fault = "a rank hangs, launch.max_restarts=1"
    return FaultOutcome(fault, shown, LOST_SINCE_CHECKPOINT, as_promised)


def asked_to_stop(injection: FaultInjection) -> FaultOutcome:
    """Sends SIGTERM to the launcher; the run must save before it ends."""
    name = "asked"
    process = injection.start(name, "checkpoint.every=1000")
    injection.wait_for(name, process, MOMENTS["a step"], 4)
    process.send_signal(signal.SIGTERM)
    ended = injection.end(name, process)
    directory = injection.folder / name
    steps = len(list(read(directory / METRICS)))
    saved = (directory / "checkpoints" / f"step_{steps:08d}").is_dir()
    as_promised = ended.code == TERMINATED and saved and injection.finishes(name)
    shown = f"exit status {ended.code}: {ended.line('stopped')}".partition(" after")[0]
    return FaultOutcome("SIGTERM", shown, "nothing", as_promised)


def damaged_checkpoint(injection: FaultInjection) -> FaultOutcome:
    """Flips one bit of the newest checkpoint; the run must go on from the one before."""
    name = "damaged"
    process = injection.start(name, "checkpoint.keep=3")
    injection.wait_for(name, process, MOMENTS["a step"], 7)
    process.kill()
    process.wait()
    newest = sorted((injection.folder / name / "checkpoints").glob("step_*"))[-1]
    largest_shard = max(newest.glob("shard_*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest_shard.read_bytes())
    content[len(content) // 2] ^= 1
    largest_shard.write_bytes(content)
    ended = injection.run(name, "checkpoint.keep=3")
    reported = f"{newest.name} is damaged" in ended.output
    as_promised = injection.matches(name, ended) and reported
    fault = "a bit of the newest checkpoint flips"
    lost = "the steps between two checkpoints"
    return FaultOutcome(fault, ended.line("is damaged"), lost, as_promised)


def diverged(injection: FaultInjection) -> FaultOutcome:
    """Makes the loss NaN by an absurd learning rate."""
    name = "diverged"
    ended = injection.run(
        name,
        "optim.learning_rate=1e30",
        "schedule.warmup_steps=0",
        "optim.max_grad_norm=0",
    )
    skipped = 0
    for row in read(injection.folder / name / METRICS):
        if row.get("skipped"):
            skipped += 1
    reported = "optim.max_skipped=3" in ended.output
    as_promised = ended.code == BAD_RUN and skipped == 3 and reported
    reason = ended.line("skipped:").partition(";")[0]
    shown = f"each such step: {reason}; after 3 in a row exit status {ended.code}"
    return FaultOutcome("the loss is NaN", shown, "the batches left out", as_promised)


def disk_full(injection: FaultInjection) -> FaultOutcome:
    """Limits the size of files, so that a checkpoint cannot be written."""
    name = "disk full"
    process = injection.start(name)
    # The ranks inherit the limit, because it is set before the launcher starts them.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (FILE_LIMIT_BYTES, FILE_LIMIT_BYTES))
    ended = injection.end(name, process)
    reported = "is full" in ended.output and "Traceback" not in ended.output
    as_promised = ended.code == BAD_RUN and reported and injection.finishes(name)
    reason = ended.line("is full").partition(str(injection.folder))[0]
    shown = f"exit status {ended.code}: {reason}..."
    return FaultOutcome("the disk is full", shown, LOST_SINCE_CHECKPOINT, as_promised)


def broken_data(injection: FaultInjection) -> FaultOutcome:
    """Breaks one document; it must be named, or left out with data.on_error=skip."""
    lines = []
    for path in sorted((injection.folder / "text").glob("*.txt")):
        lines.append(json.dumps({"text": path.read_text()}))
    middle = len(lines) // 2
    lines[middle] = lines[middle][:-9] + "\x00"
    broken = injection.folder / "broken.jsonl"
    broken.write_text("\n".join(lines) + "\n")
    overrides = (f"data.path={broken}", "parallel.context=1", "engine=single", "steps=2")

    raised = injection.run("broken", *overrides)
    refused = raised.code in (BAD_CONFIG, BAD_RUN)
    named = "broken.jsonl line" in raised.output and "Traceback" not in raised.output

    skipped = injection.run("skipped", *overrides, "data.on_error=skip")
    left_out = skipped.code == DONE and "left out 1" in skipped.output

    fault = "a document in the middle of the data is broken"
    shown = (
        f"exit status {raised.code} names the file and line; with data.on_error=skip it is left out"
        " and counted"
    )
    return FaultOutcome(fault, shown, "with skip, that document", refused and named and left_out)


def no_network(injection: FaultInjection) -> FaultOutcome:
    """Points W&B at a port where no server listens; its key must not be printed."""
    name = "no network"
    key = "0123456789" * 4
    ended = injection.run(
        name, "wandb.mode=auto", WANDB_API_KEY=key, WANDB_BASE_URL="http://127.0.0.1:9"
    )
    as_promised = injection.matches(name, ended) and key not in ended.output
    shown = ended.line("going on offline")
    return FaultOutcome("no network for W&B", shown, "nothing", as_promised)


FAULTS = (
    rank_killed,
    rank_stopped,
    rank_stopped_once,
    asked_to_stop,
    damaged_checkpoint,
    diverged,
    disk_full,
    broken_data,
    no_network,
)


def inject_faults(injection: FaultInjection) -> Iterator[FaultOutcome]:
    """Injects every fault, one after another."""
    for inject in FAULTS:
        yield inject(injection)
