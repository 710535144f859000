"""Trains a small model with the real config, model, stream and loop, and evaluates it.

    trial = Trial("linear", ("model=linear", "data=recall", "context_length=64", "steps=300"),
                  {"long": ("data.length=128",)})
    result = run_trial(trial, seed=0)        # many at once: scripts/experiments/runner.py
    result.accuracy, result.exams["long"].loss, result.rows[-1].loss, result.seconds

A run directory, checkpoints and logs are left out; figures stay in memory.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.auxiliary import on_step_begin
from models.causality import plain_sight
from models.cost.parameters import count_parameters
from models.layer import hook
from parallel.mesh import Mesh
from parallel.parallelize import parallelize
from trainer.agreement import Marks
from trainer.config.build_model import build_engine, build_model
from trainer.config.instantiate import instantiate
from trainer.config.schema import Config
from trainer.data.batch_sharding import BatchSharder
from trainer.data.lanes import Lanes
from trainer.data.streams.base import Stream
from trainer.data.streams.synthetic import SyntheticStream
from trainer.evaluation.free_running import graded, references_of, written_answers
from trainer.evaluation.held_out import HeldOutResult, evaluate
from trainer.evaluation.requests.direction import judge_requests
from trainer.logs.jsonl import MetricsRow
from trainer.logs.meters import Meter, Peak
from trainer.loop import Loop
from trainer.objectives.stream import open_rows
from trainer.preflight.prepare import load_config
from trainer.preflight.reach import fitting
from trainer.progress import Progress
from trainer.stop_signal import NO_MARKS, Meeting, StopSignal

COMMON = (  # before a lesson's own settings, which may say otherwise but for the first three
    "checkpoint.every=0",
    "evaluation.every=0",
    "engine=single",
    "evaluation.batches=8",
    "wandb.mode=disabled",
    "schedule.warmup_steps=20",
)
ANSWERS = 256  # that a model of two streams writes in an exam
HELD_OUT = "held out"  # the exam that every lesson ends with, on the settings of the lesson itself

Grade = Callable[[list[str], list[str]], Mapping[str, float]]


@dataclass(frozen=True)
class Trial:
    """A model to train and the data to evaluate it on.

    Attributes:
        name: in tables; trials of different seeds share it.
        overrides: KEY=VALUE, as on the command line of a run, without the seed.
        exams: further evaluations by name, each with overrides added to those of the trial: longer
            rows, no memory, a longer task. The weights must fit the model that they compose.
        seconds: processor time of this process after which training ends, whatever steps are left;
            None = all steps are taken. With a schedule that does not fall.
        grade: takes (answers that the model wrote, answers of the references), both as texts, and
            returns figures for the exams; None = tokens alone are compared.
    """

    name: str
    overrides: tuple[str, ...]
    exams: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seconds: float | None = None
    grade: Grade | None = None


@dataclass
class TrialResult:
    """Result of a trial.

    Attributes:
        name: of the trial.
        seed: of the trial.
        exams: loss and task metrics over `evaluation.batches` by name; HELD_OUT is on data like
            the training data.
        rows: the log, a row a step: loss, statistics of layers, seconds.
        seconds: of the whole trial.
        parameters: number of parameters.
        fault: why it failed; None when it did not.
    """

    name: str
    seed: int
    exams: dict[str, HeldOutResult] = field(default_factory=dict)
    rows: list[MetricsRow] = field(default_factory=list)
    seconds: float = 0.0
    parameters: int = 0
    fault: str | None = None

    @property
    def accuracy(self) -> float:
        """Accuracy of a task on held-out examples like the training examples."""
        return self.exams[HELD_OUT].graded["accuracy"]

    @property
    def loss(self) -> float:
        """Loss in nats per predicted token, on held-out data like the training data."""
        return self.loss_of(HELD_OUT)

    def loss_of(self, exam: str) -> float:
        """Returns the loss of an evaluation; NaN when it had nothing to predict."""
        loss = self.exams[exam].loss
        return math.nan if loss is None else loss


def run_trial(lesson: Trial, seed: int) -> TrialResult:
    """Trains and evaluates, in this process.

    Raises:
        UserError: settings that are refused, or a loss that is not finite.
    """
    began = time.perf_counter()
    every = {HELD_OUT: (), **lesson.exams}
    configs = {
        name: load_config(fitting([*COMMON, *lesson.overrides, *more, f"seed={seed}"]))
        for name, more in every.items()
    }
    config = configs[HELD_OUT]
    mesh = Mesh.alone()
    stream = _stream(config, "train")
    rows = []
    with torch.device("meta"):
        model = build_model(config, stream.vocabulary)
    parameters = count_parameters(model).total
    engine = build_engine(config, mesh, instantiate(config.optim, {}, "optim"))
    parallelize(model, engine)
    share = _share(config, model)
    loop = Loop(
        config=config,
        mesh=mesh,
        engine=engine,
        stream=stream,
        share=share,
        checkpoints=NoCheckpoints(),  # pyright: ignore[reportArgumentType]
        schedule=instantiate(config.schedule, {}, "schedule"),
        flops=lambda span, source_span: 0.0,
        meter=Meter(Peak(None, "nobody asks"), 1),
        stop=StopSignal(mesh, ()) if lesson.seconds is None else TimeLimit(mesh, lesson.seconds),
        log=rows.append,
        evaluate=lambda progress: None,
        lanes=Lanes(mesh, share, config.rows) if config.memory.carries else None,
    )
    loop.train(Progress(stream.start()))
    weights = engine.state()["model"]
    exams = {name: run_exams(each, weights, lesson.grade) for name, each in configs.items()}
    return TrialResult(lesson.name, seed, exams, rows, time.perf_counter() - began, parameters)


def run_exams(
    config: Config, weights: Mapping[str, Tensor], grade: Grade | None = None
) -> HeldOutResult:
    """Evaluates trained weights in the model and on the held-out data of a config.

    Args:
        grade: see Trial.
    """
    stream = _stream(config, "held_out")
    with torch.device("meta"):
        model = build_model(config, stream.vocabulary)
    model.load_state_dict(weights, assign=True)
    on_step_begin(
        model.eval(), config.steps
    )  # what changes with the step stands as it did at the last
    share = _share(config, model)
    lanes = Lanes(share.mesh, share, config.rows) if config.memory.carries else None
    found = evaluate(model, share, stream, config.evaluation.batches, lambda *_: False, lanes)
    assert found is not None, "nobody stops an exam"
    if hook(model, "reads_source"):
        references = references_of(stream, ANSWERS)
        answers = written_answers(model, share, references)
        figures = dict(graded(answers, references))
        if grade is not None:
            decode = stream.tokenizer.decode
            wanted = [decode(row[1:-1]) for _, row in references]
            figures |= grade([decode(answer) for answer in answers], wanted)
        found = found._replace(graded={**found.graded, **figures})
    if hook(model, "reads_requests"):
        assert isinstance(stream, SyntheticStream), "requests are drawn as they are read"
        judged = judge_requests(model, share, stream, config.evaluation.batches)
        found = found._replace(graded={**found.graded, **judged})
    return found


def _stream(config: Config, split: str) -> Stream:
    return open_rows(config, split)


def _share(config: Config, model: nn.Module) -> BatchSharder:
    return BatchSharder(
        Mesh.alone(),
        rows=config.rows,
        context_length=config.context_length,
        micro_batch=config.parallel.micro_batch,
        policy=config.parallel.layout,
        prefix=plain_sight(model),
    )


class TimeLimit(StopSignal):
    """Asks to stop when this process has computed for so many seconds more."""

    def __init__(self, mesh: Mesh, seconds: float):
        super().__init__(mesh, ())
        self.end = time.process_time() + seconds

    def begin(
        self, mine: Marks = NO_MARKS, figures: Sequence[float] = (), what: str = "the batch"
    ) -> Meeting:
        """See StopSignal.begin."""
        if time.process_time() > self.end:
            self.noted = 1
        return super().begin(mine, figures, what)


class NoCheckpoints:
    """Checkpoints that are never due, for checkpoint.every=0."""

    def poll(self) -> None:
        """Nothing is under way."""

    def finish(self) -> None:
        """Nothing is to be waited for."""
