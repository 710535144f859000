"""Writes checkpoints under a temporary name, renames them when whole, and keeps the last few.

    <run_dir>/checkpoints/step_00000100/        a whole checkpoint; for its contents see
                                                trainer/checkpoint/manifest.py
    <run_dir>/checkpoints/.step_00000100.tmp-x  one being written; the next run removes it
    <run_dir>/checkpoints/broken_00000100-x     one whose files did not match their sums; it is
                                                never read again

Every method is collective: all ranks call it, at the same step. A SIGKILL at any moment leaves the
old checkpoint or the new one. `CheckpointReader` (trainer/checkpoint/reader.py) reads;
`CheckpointWriter` also writes, and belongs to the run that owns the run directory.
"""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save, save

from trainer.checkpoint.manifest import sync, unravel
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.retention import CheckpointRetention
from trainer.checkpoint.storage import ShardWriter
from trainer.checkpoint.throttle import Throttle
from trainer.checkpoint.wholeness import STEPS
from trainer.errors import BAD_RUN, UserError
from trainer.files.safe_files import make_inside

HIDDEN = re.compile(r"\.(step_\d{8,})\.(tmp|old|gone)-[0-9a-f]+")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class PendingSave(NamedTuple):
    """A save that a background thread is writing."""

    step: int
    temporary: Path
    future: Future
    pace: Throttle


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


class CheckpointWriter(CheckpointReader):
    """Writes the checkpoints of a run and keeps the last few.

    Args:
        keep: number of checkpoints that stay, the newest included; None = all.
        retention: further ones that stay beside them, with the same `newest`; None = no others.
        asynchronous: `save` returns once the state is copied to CPU memory, and a thread writes
            it. The copy, as large as the state on this rank, stays allocated from save to save.
            Where the state lies in CPU memory anyway, training computes on the same cores, and the
            thread takes throttle.SHARE of one core until something waits for it.
        directory, group, say: see CheckpointReader.

    Raises:
        ValueError: `keep` is below 1.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        keep: int | None = 2,
        retention: CheckpointRetention | None = None,
        group: dist.ProcessGroup | None = None,
        asynchronous: bool = False,
        say: Callable[[str], None] = print,
    ):
        if keep is not None and keep < 1:
            raise ValueError(
                f"checkpoint.keep counts the newest one too; {keep} would keep none: give 1 or"
                " more, or null"
            )
        super().__init__(directory, group=group, say=say)
        self.retention = (
            CheckpointRetention(keep) if retention is None else replace(retention, newest=keep)
        )
        self.asynchronous = asynchronous
        # A second group, because the saving thread's collectives run at the same time as those of
        # `poll` in the main thread.
        self.writing = self._new_group()
        # Random, so that a new run never writes into the temporary directory of a dying one.
        self.token = self._broadcast(secrets.token_hex(4))
        self.pending: PendingSave | None = None
        self.stager = DefaultStager(StagingOptions(torch.cuda.is_available(), False, False, False))
        self._on_first_rank(self._tidy)

    def _tidy(self) -> None:
        """Removes what a killed run left half written, and restores what it had only renamed."""
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        make_inside(self.directory.parent, self.directory.name)
        for path in list(self.directory.iterdir()):
            match = HIDDEN.fullmatch(path.name)
            if match is None:
                continue
            final = self.directory / match[1]
            # The run was killed between the two renames of `_publish`: the old one is whole.
            if match[2] == "old" and not final.exists():
                path.rename(final)
            elif path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path)

    def _set_aside(self, checkpoint: Path) -> None:
        """Renames a damaged checkpoint, so that it is neither read nor counted nor deleted."""
        name = f"{checkpoint.name.replace('step', 'broken')}-{secrets.token_hex(4)}"
        self._on_first_rank(lambda: checkpoint.rename(checkpoint.with_name(name)))

    def forget_after(self, step: int) -> None:
        """Deletes the checkpoints of steps after `step`.

        A run that resumes from `step` will write the later ones again, with other contents.

        Raises:
            ValueError: `step` is outside of what a run can take; nothing is deleted.
        """
        # A negative step from a damaged file would delete every checkpoint.
        if not 0 <= step <= STEPS:
            raise ValueError(f"step={step} is no step of a run; nothing is deleted")

        def delete_later() -> None:
            for checkpoint in self._list():
                if _step(checkpoint) > step:
                    self._delete(checkpoint)

        self._on_first_rank(delete_later)

    def save(self, step: int, state: dict[str, Any], extra: dict[str, Any]) -> None:
        """Writes `state` and `extra` as the checkpoint of `step`.

        Waits for the save before it, so that two never run at the same time.

        Args:
            step: of the run.
            state: nested dicts of tensors, DTensors and plain values. A plain tensor is taken to be
                equal on all ranks; plain values are those of rank 0.
            extra: JSON; rank 0's is written.

        Raises:
            UserError: the disk is full or cannot be written; raised on every rank, with the last
                whole checkpoint untouched.
            ValueError: the state holds something else than tensors and plain values.
        """
        self.finish()
        tensors, tree = unravel(state)
        # A round trip through JSON copies the values, which training changes while a thread writes.
        head = json.loads(json.dumps({"step": step, "state": tree, "extra": extra}))
        final = self.directory / f"step_{step:08d}"
        temporary = self.directory / f".{final.name}.tmp-{self.token}"
        on_cpu = all(tensor.device.type == "cpu" for tensor in tensors.values())
        # On a GPU run the CPU's cores are mostly idle, so only a CPU run is spared.
        pace = Throttle() if self.asynchronous and on_cpu else Throttle(1)
        writer = ShardWriter(temporary, head, lambda: self._publish(temporary, final), pace)
        arguments: dict[str, Any] = {
            "storage_writer": writer,
            "planner": DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            "process_group": self.writing,
            "no_dist": self.alone,
        }
        if self.asynchronous:
            answer = async_save(tensors, async_stager=self.stager, **arguments)
            # Its type differs between versions of torch.
            future = answer.upload_completion if isinstance(answer, AsyncSaveResponse) else answer
            self.pending = PendingSave(step, temporary, future, pace)
            return
        try:
            save(tensors, **arguments)
        except CheckpointException as failure:
            self._fail(step, temporary, failure)

    def poll(self) -> int | None:
        """Returns the step whose background save has just become whole, or None.

        Call it at every step. It costs nothing while no save is pending, else one all_reduce of
        one number, so that all ranks agree.
        """
        if self.pending is None:
            return None
        done = torch.tensor(int(self.pending.future.done()))
        if not self.alone:
            dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self.control)
        if not done.item():
            return None
        return self.finish()

    def finish(self) -> int | None:
        """Waits for the background save, if any, and returns its step.

        Call it before the run ends.

        Raises:
            UserError: the save failed because of the disk.
        """
        if self.pending is None:
            return None
        step, temporary, future, pace = self.pending
        self.pending = None
        pace.hurry()
        try:
            future.result()
        except CheckpointException as failure:
            self._fail(step, temporary, failure)
        return step

    def settle(self, seconds: float) -> None:
        """Gives the background save of a run that ends by an error a last chance to complete.

        A save that fails, or is not whole in time, is reported and not raised, so that the error
        of the run stays the one that the user sees.

        Args:
            seconds: to wait at most.
        """
        if self.pending is None:
            return
        step, _, future, pace = self.pending
        pace.hurry()
        wait([future], seconds)
        trouble = future.exception() if future.done() else f"not whole after {seconds:g} s"
        if trouble is not None:
            lines = str(trouble).strip().splitlines() or [type(trouble).__name__]
            self.say(
                f"the checkpoint of step {step} was not saved either ({lines[0]}); the one before"
                " is the last"
            )

    def close(self) -> None:
        """Finishes the pending save and destroys the process groups."""
        self.finish()
        self.stager.close()
        super().close()
        if self.writing is not None:
            dist.destroy_process_group(self.writing)

    def _publish(self, temporary: Path, final: Path) -> None:
        """Makes the checkpoint exist by one rename; rank 0 calls it when all files are on disk."""
        if final.exists():
            # A directory cannot be renamed over one that has files; `_tidy` mends a kill between.
            old = final.with_name(f".{final.name}.old-{secrets.token_hex(4)}")
            final.rename(old)
            temporary.rename(final)
            # The next run's `_tidy` removes what an error leaves.
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(final)
        sync(self.directory)
        # Later steps are not counted: they belong to a run that this one will overwrite.
        up_to_this = {_step(path): path for path in self._list() if _step(path) <= _step(final)}
        try:
            kept = self.retention.steps_to_keep(up_to_this)
        except (ValueError, OSError) as error:
            # Scores that cannot be read are no reason to delete what may be the best.
            self.say(f"old checkpoints stay, for the best of them are not known: {error}")
            return
        for step, checkpoint in up_to_this.items():
            if step not in kept:
                self._delete(checkpoint)

    def _delete(self, checkpoint: Path) -> None:
        """Deletes a checkpoint; an error is reported and not raised."""
        # Renamed first: a kill in the middle must not leave half a checkpoint under a whole name.
        gone = checkpoint.with_name(f".{checkpoint.name}.gone-{secrets.token_hex(4)}")
        try:
            checkpoint.rename(gone)
            shutil.rmtree(gone)
        except OSError as error:
            self.say(f"could not delete the old checkpoint {checkpoint.name}: {error}")

    def _fail(self, step: int, temporary: Path, failure: CheckpointException) -> None:
        """Raises the error of a failed save on every rank.

        Every rank arrives here with the same failures, after all of them have stopped writing.

        Raises:
            UserError: all failures are the disk's.
            RuntimeError: one of them is a programming error.
        """
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        # A barrier: the free space named below must be that after the removal.
        self._gather(None)
        causes: dict[int, OSError] = {}
        for rank, (error, _) in failure.failures.items():
            if isinstance(error, OSError):
                causes[rank] = error
        if len(causes) < len(failure.failures):
            raise RuntimeError(f"the checkpoint of step {step} failed:\n{failure}") from failure
        rank, cause = min(causes.items())
        whole = self._list_together()
        last = f"the last whole one is {whole[0].name}" if whole else "there is none before it"
        detail = f"rank {rank}: {os.strerror(cause.errno) if cause.errno else cause}"
        if cause.errno in FULL:
            free = shutil.disk_usage(self.directory).free
            fact = (
                f"the disk under {self.directory} is full ({detail}; {free / 1e9:.2f} GB are free)"
            )
            remedy = "free some space or lower checkpoint.keep"
        else:
            fact = f"{self.directory} could not be written ({detail})"
            remedy = "mend that"
        raise UserError(
            f"the checkpoint of step {step} was not saved: {fact}; {last}; {remedy}, then give the"
            " same command again to go on from there",
            BAD_RUN,
        ) from failure
