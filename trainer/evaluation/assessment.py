"""Schedules and runs the evaluations of a run, and completes them after a resume.

The checkpoint of a step is saved before its evaluation and names the parts that are owed. A run
that resumes there does those parts that have no result yet. A part that fails is reported, and
training continues.
"""

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.engines.base import Engine
from parallel.mesh import Mesh
from trainer.agreement import Disagreement
from trainer.config.schema import Config
from trainer.data.batch_sharding import BatchSharder
from trainer.data.lanes import Lanes
from trainer.data.streams.base import Stream
from trainer.evaluation.attention_maps import attention_maps
from trainer.evaluation.generate import generate
from trainer.evaluation.held_out import evaluate
from trainer.logs import summary
from trainer.logs.console import Console
from trainer.logs.jsonl import EVALUATION, read
from trainer.logs.run_logger import RunLogger
from trainer.progress import Part, Progress
from trainer.safe_files import replace_inside
from trainer.watchdog import limit

HELD_OUT: Part = "held_out"
SAMPLE: Part = "sample"
MAPS: Part = "maps"
PARTS = (HELD_OUT, SAMPLE, MAPS)
LOSS = "held_out_loss"
# Keys of summary.json that hold the step of the last sample and of the last maps.
MARKS = {SAMPLE: "sample_step", MAPS: "maps_step"}
MEETING_S = 60.0  # that a rank whose evaluation failed waits for the others to report the same


class Assessment:
    """Runs the evaluations of a run; every rank calls the same methods at the same steps.

    Args:
        config: of the run.
        mesh: the ranks.
        directory: of the run.
        engine: holds the model.
        share: cuts batches for this rank.
        stream: held-out text; None under evaluation.every=0.
        lanes: makes new ones where `memory=` carries a state, else returns None.
        logs, console: receive the results.
        stopped: collective; True where a signal asked the run to stop.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        directory: Path,
        *,
        engine: Engine,
        share: BatchSharder,
        stream: Stream | None,
        lanes: Callable[[], Lanes | None],
        logs: RunLogger,
        console: Console,
        stopped: Callable[..., bool],
    ):
        self.config = config
        self.mesh = mesh
        self.directory = directory
        self.engine = engine
        self.share = share
        self.stream = stream
        self.lanes = lanes
        self.logs = logs
        self.console = console
        self.stopped = stopped
        self.broken: list[str] = []  # "part of step N", for the last screen
        self.meeting = _meeting(mesh, config.launch.timeout_s)

    def due(self, step: int) -> list[Part]:
        """Returns the parts of an evaluation that are due after a step."""
        settings = self.config.evaluation
        is_last = step == self.config.steps
        if not settings.every or not (is_last or step % settings.every == 0):
            return []
        parts: list[Part] = [HELD_OUT]
        if is_last and settings.sample_tokens:
            parts.append(SAMPLE)
        if is_last and settings.attention_maps:
            parts.append(MAPS)
        return parts

    def resume(self, progress: Progress) -> None:
        """Removes from `progress.owed` the parts that were done after the checkpoint was saved."""
        if not progress.owed:
            return
        if self.stream is None:
            self.console.say(
                f"step {progress.step}: its evaluation is owed, and left out under"
                " evaluation.every=0"
            )
            progress.owed = []
            return
        done, loss = self._done(progress.step)
        # The config may have changed since: a part that it no longer asks for is not owed.
        progress.owed = [
            part for part in progress.owed if part not in done and self._is_wanted(part)
        ]
        if HELD_OUT in done:
            _note_best(progress, loss)
        # Rows of an evaluation that was interrupted would otherwise be in the log twice.
        if HELD_OUT in progress.owed:
            self.logs.drop_evaluation(progress.step)
        if progress.owed:
            self.console.say(f"step {progress.step}: owed from before: {', '.join(progress.owed)}")

    def run(self, progress: Progress) -> None:
        """Does the owed parts; a part that a signal interrupts, or that fails, stays owed."""
        functions = {HELD_OUT: self._held_out, SAMPLE: self._sample, MAPS: self._maps}
        self.engine.model.eval()
        try:
            for part in list(progress.owed):
                if self.stopped():
                    return
                if self._try(part, progress, functions[part]):
                    progress.owed.remove(part)
                elif not self.stopped():
                    self.broken.append(f"{part} of step {progress.step}")
        finally:
            self.engine.model.train()

    def _is_wanted(self, part: str) -> bool:
        settings = self.config.evaluation
        if part == HELD_OUT:
            return True
        if part == SAMPLE:
            return settings.sample_tokens > 0
        return part == MAPS and settings.attention_maps > 0

    def _done(self, step: int) -> tuple[set[str], float]:
        """Returns (parts that have a result for this step, the held-out loss) on every rank."""
        answers = torch.zeros(len(PARTS) + 1, dtype=torch.float64, device=self.mesh.device)
        # Rank 0 alone has the files; the sum over ranks is then a broadcast.
        if self.mesh.world.rank == 0:
            losses = []
            for row in read(self.directory / EVALUATION):
                if _is_loss(row, step):
                    losses.append(row["value"])
            facts = _facts(self.directory)
            has_sample = facts.get(MARKS[SAMPLE]) == step
            has_maps = facts.get(MARKS[MAPS]) == step
            loss = losses[-1] if losses else 0.0
            own_answers = [float(bool(losses)), float(has_sample), float(has_maps), loss]
            answers[:] = torch.tensor(own_answers, dtype=torch.float64)
        if self.mesh.world.group is not None:
            dist.all_reduce(answers, group=self.mesh.world.group)
        *flags, loss = answers.tolist()
        return {part for part, flag in zip(PARTS, flags) if flag}, loss

    def _try(self, part: str, progress: Progress, function: Callable[[Progress], bool]) -> bool:
        """Runs a part, and returns True if it was done; an error on every rank is only reported."""
        trouble = None
        begun_before = _collectives_begun(self.mesh)
        try:
            done = function(progress)
        except Exception as error:
            # Ranks that read other data, or cannot reach one another, cannot train on either.
            if isinstance(error, Disagreement) or _is_lost_contact(error):
                raise
            trouble = error
            done = False
        if self._any_failed(trouble, begun_before):
            reason = _reason(trouble) if trouble is not None else "another rank says why"
            self.console.say(
                f"step {progress.step}: {part} failed: {reason}; training is not affected"
            )
            return False
        return done

    def _any_failed(self, trouble: Exception | None, begun_before: int) -> bool:
        """Tells if a part failed on any rank.

        A rank that alone fails has left the others in a collective that it will never join; its
        error is raised, and ends the run. Ranks therefore compare how many collectives they have
        begun since the part was begun; what was begun before it may honestly differ among ranks.

        Args:
            trouble: this rank's error, if any.
            begun_before: the collectives that this rank had begun when the part began.
        """
        if self.meeting is None:
            return trouble is not None
        begun = float(_collectives_begun(self.mesh) - begun_before)
        # Of the maximum of x and of -x, one reduction gives the largest and the smallest x.
        report = torch.tensor([float(trouble is not None), begun, -begun], dtype=torch.float64)
        # The others may hang in a collective: a rank in trouble does not wait for the full timeout.
        if trouble is not None:
            limit([self.meeting], MEETING_S)
        try:
            dist.all_reduce(report, op=dist.ReduceOp.MAX, group=self.meeting)
        except RuntimeError:
            if trouble is not None:
                raise trouble from None
            raise
        limit([self.meeting], self.config.launch.timeout_s)
        failed, largest, negated_smallest = report.tolist()
        if failed and largest != -negated_smallest:
            raise trouble or RuntimeError("an evaluation broke on another rank, which says why")
        return failed > 0

    def _held_out(self, progress: Progress) -> bool:
        """Computes and logs the held-out loss; False when a signal interrupts it."""
        assert self.stream is not None
        batches = self.config.evaluation.batches
        result = evaluate(
            self.engine.model, self.share, self.stream, batches, self.stopped, self.lanes()
        )
        if result is None:
            return False
        step = progress.step
        if result.loss is None:
            self.console.say(
                f"step {step}: no held-out loss, for the held-out data has no token to predict;"
                " raise data.held_out, or give other data"
            )
            return True
        _note_best(progress, result.loss)
        self.console.say(
            f"step {step}: held-out loss {result.loss:.4f} over {result.tokens} tokens"
        )
        for name, value in result.graded.items():
            self.console.say(f"step {step}: held-out {name} {value:.4f}")
            self.logs.evaluation(step, name, value)
        # Last, because `resume` takes a step whose loss is on disk for done.
        self.logs.evaluation(
            step, LOSS, result.loss, tokens=result.tokens, by_position=result.by_position
        )
        return True

    def _sample(self, progress: Progress) -> bool:
        """Writes the model's continuation of the prompt; False when a signal interrupts it."""
        assert self.stream is not None
        settings = self.config.evaluation
        text = generate(
            self.engine.model,
            self.share,
            self.stream.tokenizer,
            settings.prompt,
            settings.sample_tokens,
            seed=self.config.seed,
            step=progress.step,
            stop=self.stopped,
        )
        if text is None:
            return False
        quoted = "\n".join(f"  | {line}" for line in text.split("\n"))
        self.console.say(f"sample:\n{quoted}")
        if self.mesh.world.rank == 0:
            path = self.directory / "sample.txt"
            replace_inside(path.parent, path.name, text.encode("utf-8", "backslashreplace"))
            self.logs.note(**{MARKS[SAMPLE]: progress.step})
        return True

    def _maps(self, progress: Progress) -> bool:
        """Draws attention maps."""
        assert self.stream is not None
        tokens = self.config.evaluation.attention_maps
        maps, left_out = attention_maps(self.engine.model, self.share, self.stream, tokens)
        self.logs.maps(progress.step, maps, left_out)
        self.logs.note(**{MARKS[MAPS]: progress.step})
        return True


def _meeting(mesh: Mesh, timeout_s: float) -> dist.ProcessGroup | None:
    """Makes the group on which ranks report a failed evaluation; None for a single rank.

    On a group of its own the report cannot be matched with a collective of the evaluation.
    """
    if mesh.world.group is None or mesh.world.size == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup), "every rank belongs to it"
    return group


def _collectives_begun(mesh: Mesh) -> int:
    """Counts the collectives that this rank has begun on the groups of the mesh."""
    count = 0
    for group in mesh.groups:
        count += group._get_sequence_number_for_group()  # pyright: ignore[reportAttributeAccessIssue]
    return count


def _is_lost_contact(error: Exception) -> bool:
    """Tells if ranks have lost contact, after which the run must end."""
    lost = isinstance(error, dist.DistError | ConnectionError)
    return lost or "timed out" in str(error).lower()


def _reason(error: Exception) -> str:
    """Describes an error in one line, with the file and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}{place}"


def _is_loss(row: dict[str, Any], step: int) -> bool:
    return row["step"] == step and row.get("name") == LOSS and row.get("value") is not None


def _facts(directory: Path) -> dict[str, Any]:
    try:
        return summary.read(directory)
    except ValueError:
        # A damaged summary only means that a part is done again.
        return {}


def _note_best(progress: Progress, loss: float) -> None:
    progress.best[LOSS] = min(loss, progress.best.get(LOSS, loss))
