"""Schedules and runs the evaluations of a run, and completes them after a resume.

A part is an evaluation that the config names, the sample, or the attention maps. The checkpoint of
a step is saved before its evaluation and names the parts that are owed. A run that resumes there
does those parts that have no result yet. A part that fails is reported, and training continues.
"""

import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.engines.base import Engine
from parallel.mesh import Mesh
from trainer.agreement import Disagreement
from trainer.config.build_model import build_cache
from trainer.config.schema import Config
from trainer.data.batch_sharding import BatchSharder
from trainer.data.lanes import Lanes
from trainer.data.streams.base import Stream
from trainer.evaluation.attention_maps import attention_maps, state_maps, write_page
from trainer.evaluation.base import (
    HELD_OUT_PART,
    Evaluation,
    EvaluationContext,
    Figure,
    Interrupted,
    build_evaluations,
    figure_name,
    part_of,
)
from trainer.evaluation.generate import generate
from trainer.evaluation.held_out import LOSS
from trainer.files.safe_files import replace_inside
from trainer.logs import summary
from trainer.logs.console import Console
from trainer.logs.jsonl import EVALUATION, read
from trainer.logs.run_logger import RunLogger
from trainer.progress import Part, Progress
from trainer.watchdog import limit

SAMPLE: Part = "sample"
MAPS: Part = "maps"
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
        lanes: makes new ones for a sharder where `memory=` carries a state, else returns None.
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
        lanes: Callable[[BatchSharder], Lanes | None],
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
        self.evaluations: dict[str, Evaluation] = {}
        self.names: dict[str, str] = {}  # in the config, by part
        if config.evaluation.every:
            for name, evaluation in build_evaluations(config).items():
                self.evaluations[part_of(name)] = evaluation
                self.names[part_of(name)] = name
        self.seconds: dict[str, float] = {}  # spent on each part
        self.began = time.monotonic()
        self.broken: list[str] = []  # "part of step N", for the last screen
        self.meeting = _meeting(mesh, config.launch.timeout_s)

    def due(self, step: int) -> list[Part]:
        """Returns the parts of an evaluation that are due after a step."""
        settings = self.config.evaluation
        is_last = step == self.config.steps
        parts: list[Part] = []
        for part, evaluation in self.evaluations.items():
            every = evaluation.every or settings.every
            if is_last or step % every == 0:
                parts.append(part)
        if is_last and settings.every and settings.sample_tokens:
            parts.append(SAMPLE)
        if is_last and settings.every and settings.attention_maps:
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
        if HELD_OUT_PART in done:
            _note_best(progress, loss)
        # Rows of an evaluation that was interrupted would otherwise be in the log twice.
        self.logs.drop_evaluation(progress.step, progress.owed)
        if progress.owed:
            self.console.say(f"step {progress.step}: owed from before: {', '.join(progress.owed)}")

    def run(self, progress: Progress) -> None:
        """Does the owed parts; a part that a signal interrupts, or that fails, stays owed."""
        functions = {SAMPLE: self._sample, MAPS: self._maps}
        self.engine.model.eval()
        try:
            for part in list(progress.owed):
                if self.stopped():
                    return
                function = functions.get(part) or partial(self._evaluation, part)
                if self._try(part, progress, function):
                    progress.owed.remove(part)
                elif not self.stopped():
                    self.broken.append(f"{part} of step {progress.step}")
        finally:
            self.engine.model.train()

    def cost(self) -> str | None:
        """Returns one line about the time that evaluations took; None where there were none."""
        spent = sum(self.seconds.values())
        if not spent:
            return None
        share = spent / max(time.monotonic() - self.began, spent)
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"evaluation: {spent:.1f} s, {share:.0%} of this run's time ({parts})"

    def _is_wanted(self, part: str) -> bool:
        settings = self.config.evaluation
        if part == SAMPLE:
            return settings.sample_tokens > 0
        if part == MAPS:
            return settings.attention_maps > 0
        return part in self.evaluations

    def _done(self, step: int) -> tuple[set[str], float]:
        """Returns (parts that have a result for this step, the held-out loss) on every rank."""
        parts = [*self.evaluations, SAMPLE, MAPS]
        answers = torch.zeros(len(parts) + 1, dtype=torch.float64, device=self.mesh.device)
        # Rank 0 alone has the files; the sum over ranks is then a broadcast.
        if self.mesh.world.rank == 0:
            done = set()
            for row in read(self.directory / EVALUATION):
                if _is_loss(row, step):
                    done.add(HELD_OUT_PART)
                    answers[-1] = row["value"]
                elif row["step"] == step and row.get("done"):
                    done.add(row["part"])
            facts = _facts(self.directory)
            done |= {part for part, key in MARKS.items() if facts.get(key) == step}
            for index, part in enumerate(parts):
                answers[index] = float(part in done)
        if self.mesh.world.group is not None:
            dist.all_reduce(answers, group=self.mesh.world.group)
        *flags, loss = answers.tolist()
        return {part for part, flag in zip(parts, flags) if flag}, loss

    def _try(self, part: str, progress: Progress, function: Callable[[Progress], bool]) -> bool:
        """Runs a part, and returns True if it was done; an error on every rank is only reported."""
        trouble = None
        begun_before = _collectives_begun(self.mesh)
        began = time.monotonic()
        try:
            done = function(progress)
        except Interrupted:
            # On every rank, so there is no trouble to compare.
            done = False
        except Exception as error:
            # Ranks that read other data, or cannot reach one another, cannot train on either.
            if isinstance(error, Disagreement) or _is_lost_contact(error):
                raise
            trouble = error
            done = False
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - began
        if self._any_failed(trouble, begun_before):
            reason = _reason(trouble) if trouble is not None else "another rank says why"
            self.console.warn(
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

    def context(self, step: int) -> EvaluationContext:
        """Returns what an evaluation works with at a step."""
        assert self.stream is not None
        return EvaluationContext(
            config=self.config,
            model=self.engine.model,
            share=self.share,
            stream=self.stream,
            lanes=self.lanes,
            step=step,
            stopped=self.stopped,
        )

    def _evaluation(self, part: str, progress: Progress) -> bool:
        """Runs an evaluation of the config and logs its figures."""
        step = progress.step
        figures = self.evaluations[part].run(self.context(step))
        if not figures:
            what = "held-out loss" if part == HELD_OUT_PART else f"figure of {part}"
            self.console.warn(
                f"step {step}: no {what}, for the held-out data has no token to predict;"
                " raise data.held_out, or give other data"
            )
            return True
        first, *others = figures
        for figure in others:
            self._log(part, step, figure)
        # Last, because `resume` takes a step whose first figure is on disk for done.
        self._log(part, step, first, done=True)
        if part == HELD_OUT_PART:
            _note_best(progress, first.value)
        return True

    def _log(self, part: str, step: int, figure: Figure, done: bool = False) -> None:
        """Logs a figure; those of the held-out loss as they were before others had names."""
        name = figure_name(self.names[part], figure.name)
        if part == HELD_OUT_PART:
            if figure.name != LOSS:
                self.console.say(f"step {step}: held-out {name} {figure.value:.4f}")
                self.logs.evaluation(step, name, figure.value)
                return
            tokens = sum(cell["tokens"] for cell in figure.cells)
            self.console.say(f"step {step}: held-out loss {figure.value:.4f} over {tokens} tokens")
            self.logs.evaluation(
                step, name, figure.value, tokens=tokens, by_position=list(figure.cells)
            )
            return
        row: dict[str, Any] = {"part": part}
        chance = ""
        if figure.chance is not None:
            row["chance"] = figure.chance
            chance = f" (chance {figure.chance:.4f})"
        if figure.cells:
            row["cells"] = list(figure.cells)
        if done:
            row["done"] = True
        self.console.say(f"step {step}: {name} {figure.value:.4f}{chance}")
        self.logs.evaluation(step, name, figure.value, **row)

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
            cache=build_cache(self.config),
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
        states = state_maps(self.engine.model, self.share, self.stream, tokens)
        if (maps or states) and self.mesh.world.rank == 0:
            title = f"{self.config.name}: attention at step {progress.step}"
            write_page(self.directory, title, maps, states, self.engine.model, self.stream)
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
