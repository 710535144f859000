"""Checkpoints: written beside, renamed whole, kept to the last few, and read back on any number of
ranks.

    <run_dir>/checkpoints/step_00000100/          a whole checkpoint (what is inside: trainer/checkpoint/manifest.py)
    <run_dir>/checkpoints/.step_00000100.tmp-x    one being written; removed when the next run begins
    <run_dir>/checkpoints/broken_00000100-x       one whose files did not match their sums; nobody reads it again

Every method is collective: all ranks call it, at the same step. A SIGKILL at any moment leaves the
old or the new. `Archive` (trainer/checkpoint/reader.py) reads; `Checkpoints` also writes, and
belongs to the run that holds the run directory.
"""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import Future, wait
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
from trainer.checkpoint.storage import ShardWriter
from trainer.checkpoint.throttle import Throttle
from trainer.checkpoint.wholeness import STEPS
from trainer.errors import BAD_RUN, UserError
from trainer.safe_files import make_inside

HIDDEN = re.compile(r"\.(step_\d{8,})\.(tmp|old|gone)-[0-9a-f]+")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class PendingSave(NamedTuple):
    """A save on its way in the background."""

    step: int
    temporary: Path
    future: Future
    pace: Throttle


def _step(place: Path) -> int:
    return int(place.name.removeprefix("step_"))


class CheckpointWriter(CheckpointReader):
    """Writes the checkpoints of a run and keeps the last few.

    Args:
        keep: how many checkpoints stay, the newest included; None = all.
        asynchronous: `save` returns once the state is copied to the CPU's memory; writing goes on
            in a thread. The copy's memory, as large as the state on this rank, is kept from save to
            save. Where the state lies in the CPU's memory anyway, training computes on the same
            cores, and the thread takes SHARE of one until somebody waits for it.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        keep: int | None = 2,
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
        self.keep = keep
        self.asynchronous = asynchronous
        self.writing = self._group()
        self.token = self._from_first(secrets.token_hex(4))
        self.pending: PendingSave | None = None
        self.stager = DefaultStager(StagingOptions(torch.cuda.is_available(), False, False, False))
        self._on_first(self._tidy)

    def _tidy(self) -> None:
        """Remove what a killed run left half-written or half-deleted; put back what it had only
        moved away."""
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        make_inside(self.directory.parent, self.directory.name)
        for path in list(self.directory.iterdir()):
            match = HIDDEN.fullmatch(path.name)
            if match and match[2] == "old" and not (self.directory / match[1]).exists():
                path.rename(self.directory / match[1])
            elif match and path.is_symlink():
                path.unlink()
            elif match:
                shutil.rmtree(path)

    def _set_aside(self, place: Path) -> None:
        aside = place.with_name(f"{place.name.replace('step', 'broken')}-{secrets.token_hex(4)}")
        self._on_first(lambda: place.rename(aside))

    def forget_after(self, step: int) -> None:
        """Delete checkpoints of later steps: a run resumed from `step` will write these steps
        again, differently.

        Raises:
            ValueError: a step that no run can be at; nothing is deleted.
        """
        if not 0 <= step <= STEPS:
            raise ValueError(f"step={step} is no step of a run; nothing is deleted")
        self._on_first(
            lambda: [self._delete(place) for place in self._list() if _step(place) > step]
        )

    def save(self, step: int, state: dict[str, Any], extra: dict[str, Any]) -> None:
        """Write `state` and `extra` as the checkpoint of `step`; waits for the save before it,
        never two at once.

        Args:
            state: nested dicts of tensors, DTensors and plain values. A plain tensor is taken to be
                equal on all ranks; plain values and `extra` (JSON) are rank 0's.

        Raises:
            Fault: the disk is full or cannot be written; on every rank, with the last whole
                checkpoint untouched.
            ValueError: the state holds something else than tensors and plain values.
        """
        self.finish()
        tensors, tree = unravel(state)
        head = json.loads(json.dumps({"step": step, "state": tree, "extra": extra}))
        final = self.directory / f"step_{step:08d}"
        temporary = self.directory / f".{final.name}.tmp-{self.token}"
        beside = self.asynchronous and all(
            tensor.device.type == "cpu" for tensor in tensors.values()
        )
        pace = Throttle() if beside else Throttle(1)
        writer = ShardWriter(temporary, head, lambda: self._publish(temporary, final), pace)
        wishes: dict[str, Any] = {
            "storage_writer": writer,
            "planner": DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            "process_group": self.writing,
            "no_dist": self.alone,
        }
        if self.asynchronous:
            answer = async_save(tensors, async_stager=self.stager, **wishes)
            future = answer.upload_completion if isinstance(answer, AsyncSaveResponse) else answer
            self.pending = PendingSave(step, temporary, future, pace)
            return
        try:
            save(tensors, **wishes)
        except CheckpointException as failure:
            self._failed(step, temporary, failure)

    def poll(self) -> int | None:
        """Look after the save in the background: the step that has just become whole, or None. Call
        it every step.

        Costs nothing when none is under way, else one all_reduce of one number, so that all ranks
        see the same.
        """
        if self.pending is None:
            return None
        done = torch.tensor(int(self.pending.future.done()))
        if not self.alone:
            dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self.control)
        return self.finish() if done.item() else None

    def finish(self) -> int | None:
        """Wait for the save in the background, if any, and return its step. Call it before the run
        ends."""
        if self.pending is None:
            return None
        step, temporary, future, pace = self.pending
        self.pending = None
        pace.hurry()
        try:
            future.result()
        except CheckpointException as failure:
            self._failed(step, temporary, failure)
        return step

    def settle(self, seconds: float) -> None:
        """Let the save in the background come to its end, for so long at most: the run ends, for
        another reason.

        A save that fails, or is not whole by then, is said and not raised, so that the reason stays
        the run's own.
        """
        if self.pending is None:
            return
        step, _, future, pace = self.pending
        pace.hurry()
        wait([future], seconds)
        trouble = future.exception() if future.done() else f"not whole after {seconds:g} s"
        if trouble is not None:
            brief = str(trouble).strip().splitlines() or [type(trouble).__name__]
            self.say(
                f"the checkpoint of step {step} was not saved either ({brief[0]}); the one before"
                " is the last"
            )

    def close(self) -> None:
        """Finish, and give the communication back."""
        self.finish()
        self.stager.close()
        super().close()
        if self.writing is not None:
            dist.destroy_process_group(self.writing)

    def _publish(self, temporary: Path, final: Path) -> None:
        """On rank 0, when every file is on the disk: one rename makes the checkpoint exist."""
        if final.exists():
            old = final.with_name(f".{final.name}.old-{secrets.token_hex(4)}")
            final.rename(old)
            temporary.rename(final)
            shutil.rmtree(
                old, ignore_errors=True
            )  # what is left of it goes when the next run begins
        else:
            temporary.rename(final)
        sync(self.directory)
        if self.keep is not None:
            upto = [place for place in self._list() if _step(place) <= _step(final)]
            for place in upto[self.keep :]:
                self._delete(place)

    def _delete(self, place: Path) -> None:
        """Rename first: a checkpoint that is half gone must not look like one."""
        gone = place.with_name(f".{place.name}.gone-{secrets.token_hex(4)}")
        try:
            place.rename(gone)
            shutil.rmtree(gone)
        except OSError as error:
            self.say(f"could not delete the old checkpoint {place.name}: {error}")

    def _failed(self, step: int, temporary: Path, failure: CheckpointException) -> None:
        """Every rank comes here with the same failures, after all of them have stopped writing."""
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        self._gather(None)
        causes = {
            rank: error
            for rank, (error, _) in failure.failures.items()
            if isinstance(error, OSError)
        }
        if len(causes) < len(failure.failures):
            raise RuntimeError(f"the checkpoint of step {step} failed:\n{failure}") from failure
        rank, cause = min(causes.items())
        whole = self._found()
        left = f"the last whole one is {whole[0].name}" if whole else "there is none before it"
        what = f"rank {rank}: {os.strerror(cause.errno) if cause.errno else cause}"
        if cause.errno in FULL:
            free = shutil.disk_usage(self.directory).free
            text = f"the disk under {self.directory} is full ({what}; {free / 1e9:.2f} GB are free)"
            way = "free some space or lower checkpoint.keep"
        else:
            text = f"{self.directory} could not be written ({what})"
            way = "mend that"
        raise UserError(
            f"the checkpoint of step {step} was not saved: {text}; {left}; {way}, then give the"
            " same command again to go on from there",
            BAD_RUN,
        ) from failure
