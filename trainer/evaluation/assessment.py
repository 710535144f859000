"""Evaluations of a run: what is due at a step, what of it was done, and what is owed still.

The checkpoint of a step is saved before its evaluation and names the parts that are owed. A run
that resumes there does those that it finds no result of. Whatever breaks a part is said, and
training goes on.
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
MARKS = {
    SAMPLE: "sample_step",
    MAPS: "maps_step",
}  # of summary.json: the step that the last one is of
MEETING_S = 60.0  # how long a rank whose evaluation broke waits for the others to say the same


class Assessment:
    """The evaluations of a run; made on every rank, and every rank calls the same methods at the
    same steps.

    Args:
        stream: held-out text; None under evaluation.every=0.
        lanes: makes new ones, where `memory=` carries something.
        stopped: as Stop.asked: whether a signal asked the run to stop; collective.
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
        """The parts of an evaluation that are due after a step."""
        wish = self.config.evaluation
        last = step == self.config.steps
        if not wish.every or not (last or step % wish.every == 0):
            return []
        parts: list[Part] = [HELD_OUT]
        if last and wish.sample_tokens:
            parts.append(SAMPLE)
        if last and wish.attention_maps:
            parts.append(MAPS)
        return parts

    def resume(self, progress: Progress) -> None:
        """Strike from what a checkpoint owes those parts that an earlier life did after it was
        saved."""
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
        progress.owed = [
            part for part in progress.owed if part not in done and self._is_wanted(part)
        ]
        if HELD_OUT in done:
            _note_best(progress, loss)
        if HELD_OUT in progress.owed:
            self.logs.drop_evaluation(progress.step)
        if progress.owed:
            self.console.say(f"step {progress.step}: owed from before: {', '.join(progress.owed)}")

    def run(self, progress: Progress) -> None:
        """Do what is owed; a signal leaves the rest owed, and so does what breaks."""
        self.engine.model.eval()
        try:
            for part in list(progress.owed):
                if self.stopped():
                    return
                work = {HELD_OUT: self._held_out, SAMPLE: self._sample, MAPS: self._maps}[part]
                if self._survived(part, progress, work):
                    progress.owed.remove(part)
                elif not self.stopped():
                    self.broken.append(f"{part} of step {progress.step}")
        finally:
            self.engine.model.train()

    def _is_wanted(self, part: str) -> bool:
        wish = self.config.evaluation
        return {HELD_OUT: True, SAMPLE: wish.sample_tokens > 0, MAPS: wish.attention_maps > 0}.get(
            part, False
        )

    def _done(self, step: int) -> tuple[set[str], float]:
        """(parts of which rank 0 has a result for this step, the held-out loss); the same on every
        rank."""
        answers = torch.zeros(len(PARTS) + 1, dtype=torch.float64, device=self.mesh.device)
        if self.mesh.world.rank == 0:
            losses = [
                row["value"] for row in read(self.directory / EVALUATION) if _is_loss(row, step)
            ]
            facts = _facts(self.directory)
            marked = [float(facts.get(MARKS[part]) == step) for part in (SAMPLE, MAPS)]
            loss = losses[-1] if losses else 0.0
            answers[:] = torch.tensor([float(bool(losses)), *marked, loss], dtype=torch.float64)
        if self.mesh.world.group is not None:
            dist.all_reduce(answers, group=self.mesh.world.group)
        *flags, loss = answers.tolist()
        return {part for part, flag in zip(PARTS, flags) if flag}, loss

    def _survived(self, part: str, progress: Progress, work: Callable[[Progress], bool]) -> bool:
        """Whether a part was done; what breaks it on every rank alike is said, and ends nothing."""
        trouble = None
        try:
            done = work(progress)
        except Exception as error:
            if isinstance(error, Disagreement) or _is_lost_contact(error):
                raise
            trouble = error
            done = False
        if self._any_broke(trouble):
            reason = _reason(trouble) if trouble is not None else "another rank says why"
            self.console.say(
                f"step {progress.step}: {part} failed: {reason}; training is not affected"
            )
            return False
        return done

    def _any_broke(self, trouble: Exception | None) -> bool:
        """Whether a part broke on any rank.

        A rank alone in its trouble has left the others in a collective that it will never join:
        then the trouble is raised, and ends the run. So ranks compare how many collectives they
        have begun.
        """
        if self.meeting is None:
            return trouble is not None
        begun = float(_collectives_begun(self.mesh))
        words = torch.tensor([float(trouble is not None), begun, -begun], dtype=torch.float64)
        if trouble is not None:
            limit([self.meeting], MEETING_S)
        try:
            dist.all_reduce(words, op=dist.ReduceOp.MAX, group=self.meeting)
        except RuntimeError:
            if trouble is not None:
                raise trouble from None
            raise
        limit([self.meeting], self.config.launch.timeout_s)
        broke, most, least = words.tolist()
        if broke and most != -least:
            raise trouble or RuntimeError("an evaluation broke on another rank, which says why")
        return broke > 0

    def _held_out(self, progress: Progress) -> bool:
        """The held-out loss; False when a signal came in the middle."""
        assert self.stream is not None
        wish = self.config.evaluation
        result = evaluate(
            self.engine.model, self.share, self.stream, wish.batches, self.stopped, self.lanes()
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
        # last, for a step whose loss is on disk owes nothing
        self.logs.evaluation(
            step, LOSS, result.loss, tokens=result.tokens, by_position=result.by_position
        )
        return True

    def _sample(self, progress: Progress) -> bool:
        """Write what the model makes of the prompt; False when a signal came in the middle."""
        assert self.stream is not None
        wish = self.config.evaluation
        text = generate(
            self.engine.model,
            self.share,
            self.stream.tokenizer,
            wish.prompt,
            wish.sample_tokens,
            seed=self.config.seed,
            step=progress.step,
            stop=self.stopped,
        )
        if text is None:
            return False
        self.console.say("sample:\n" + "\n".join(f"  | {line}" for line in text.split("\n")))
        if self.mesh.world.rank == 0:
            path = self.directory / "sample.txt"
            replace_inside(path.parent, path.name, text.encode("utf-8", "backslashreplace"))
            self.logs.note(**{MARKS[SAMPLE]: progress.step})
        return True

    def _maps(self, progress: Progress) -> bool:
        """Draw attention maps."""
        assert self.stream is not None
        tokens = self.config.evaluation.attention_maps
        self.logs.maps(
            progress.step, *attention_maps(self.engine.model, self.share, self.stream, tokens)
        )
        self.logs.note(**{MARKS[MAPS]: progress.step})
        return True


def _meeting(mesh: Mesh, timeout_s: float) -> dist.ProcessGroup | None:
    """A group apart, on which ranks may say that an evaluation broke; the others' order of
    collectives stays theirs."""
    if mesh.world.group is None or mesh.world.size == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup), "every rank belongs to it"
    return group


def _collectives_begun(mesh: Mesh) -> int:
    """How many collectives this rank has begun on the groups of the mesh."""
    count = 0
    for group in mesh.groups:
        count += group._get_sequence_number_for_group()  # pyright: ignore[reportAttributeAccessIssue]
    return count


def _is_lost_contact(error: Exception) -> bool:
    """Whether ranks have lost one another, which nothing but an end mends."""
    lost = isinstance(error, dist.DistError | ConnectionError)
    return lost or "timed out" in str(error).lower()


def _reason(error: Exception) -> str:
    """An error in one line, with the place where it arose."""
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
        return {}  # what a broken disk left: the part is done again


def _note_best(progress: Progress, loss: float) -> None:
    progress.best[LOSS] = min(loss, progress.best.get(LOSS, loss))
