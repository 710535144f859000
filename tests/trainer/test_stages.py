"""A run in stages: its ranks change between them, a kill anywhere resumes in the right one."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from models.micro_batch import MicroBatch
from parallel.engines.materialize import materialize
from tests.support.pool import ranks
from trainer import __main__ as command
from trainer import stages as stages_run
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.stage_state import STATE
from trainer.config.build_model import build_model, offered_sizes
from trainer.config.compose import compose
from trainer.config.instantiate import instantiate
from trainer.config.schema import Config
from trainer.config.stages import config_at, plan_of, schedule_over
from trainer.evaluation.assessment import Assessment
from trainer.launch.elastic import RankInfo
from trainer.launch.exit_report import ExitReport
from trainer.logs.jsonl import METRICS, read
from trainer.loop import Loop
from trainer.objectives.stream import open_rows
from trainer.preflight.check import check_config
from trainer.progress import Progress
from trainer.run_dir import make_run_dir, other_run, read_config, record
from trainer.verify.whole_runs import write_documents

# Three stages on 1, 2 and 3 ranks that share a row: longer rows, another theta, then YaRN; the
# learning rate of each is its own. Lengths that do not divide among the ranks.
STAGES = (
    "stages=["
    "{name:short,steps:4,context_length:30,batch_tokens:120},"
    "{steps:3,context_length:62,batch_tokens:124,learning_rate:0.002,parallel:{context:2},"
    "position:{theta:40000.0}},"
    "{steps:3,context_length:125,batch_tokens:125,learning_rate:0.001,parallel:{context:3},"
    "position:{_target_:models.positions.yarn.Yarn,factor:4.0,original_length:30},"
    "checkpointing:full}]"
)
SMALL = (
    "precision=float64",
    "model.width=16",
    "model.layers=2",
    "model.heads=2",
    "schedule.warmup_steps=2",
    "optim.learning_rate=0.003",
    "wandb.mode=disabled",
    "log.plots=false",
    "checkpoint.every=2",
    "checkpoint.asynchronous=false",
    "evaluation.batches=1",
)


class Killed(BaseException):
    """Ends a rank at once, as SIGKILL would: nothing is tidied up or saved."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("data")
    glob = write_documents(folder / "text")
    return ("data=files", f"data.path={glob}", f"data.cache={folder / 'cache'}")


def config_of(words) -> Config:
    config = compose([*words]).config
    assert config is not None
    return config


def killed_at(moment: str | None):
    """Patches a moment of a run so that it kills the rank: 'step 3', 'evaluation 4', ..."""
    kind, _, number = (moment or "never 0").partition(" ")

    def kills(original):
        def patched(self, progress, *rest):
            if progress.step + (kind == "step") == int(number):
                raise Killed
            return original(self, progress, *rest)

        return patched

    def note(directory, stage):
        if kind == "before-note" and stage.number == int(number):
            raise Killed
        original_note(directory, stage)
        if kind == "after-note" and stage.number == int(number):
            raise Killed

    original_note = stages_run.note_stage
    if kind == "step":
        return mock.patch.object(Loop, "take_step", kills(Loop.take_step))
    if kind == "evaluation":
        return mock.patch.object(Assessment, "run", kills(Assessment.run))
    return mock.patch.object(stages_run, "note_stage", note)


def in_rank(env, words, directory, moment):
    config = config_of(words)
    place = RankInfo(env.rank, env.size, env.rank, env.size, torch.device("cpu"), "gloo")
    with killed_at(moment):
        try:
            return stages_run.run(config, place, Path(directory))
        except Killed:
            return "killed"


def drive(words, directory: Path, moment: str | None = None) -> tuple[int | str, list[int]]:
    """Does what the command does, on ranks of the pool; returns its code and their numbers."""
    started = []

    def start_ranks(arguments, *, ranks: int, **rest):
        started.append(ranks)
        codes = pool(ranks, in_rank, words, str(directory), moment)
        return ExitReport(codes[0])

    pool = ranks
    make_run_dir(directory)
    config = config_of(words)
    record(directory, config)
    with mock.patch.object(command.elastic, "start_ranks", start_ranks):
        report = command.start_stages(config, directory, [])
    return report.code, started


def rows_of(directory: Path):
    return list(read(directory / METRICS))


def saved_weights(directory: Path, step: int):
    config = config_at(read_config(directory), step)
    with torch.device("meta"):
        model = build_model(config, 256 + 3).double()
    archive = CheckpointReader(directory / "checkpoints")
    place = directory / "checkpoints" / f"step_{step:08d}"
    state = archive.blank(place, "model")
    assert state.keys() == model.state_dict().keys()
    return archive.load(place, {"model": state}).state["model"]


def by_hand(words):
    """The same steps in a plain loop over one model, whose positions are put in place by hand."""
    config = config_of(words)
    plan = plan_of(config)
    schedule = schedule_over(config, instantiate(config.schedule, {}, "schedule"))
    stream = open_rows(plan[0].config, "train")
    with torch.device("meta"):
        model = build_model(plan[0].config, stream.vocabulary).double()
    materialize(model, torch.device("cpu"), config.seed)
    optimiser = instantiate(config.optim, {}, "optim")(model, dict(model.named_parameters()))
    losses = []
    step = 0
    for stage in plan:
        stream = open_rows(stage.config, "train")
        cursor = stream.start()
        offers = offered_sizes(stage.config, stream.vocabulary)
        for block in model.blocks:
            block.mixer.position = instantiate(stage.config.position, offers, "position")
        while step < stage.config.steps:
            step += 1
            batch, cursor = stream.read(cursor)
            token_losses = model(MicroBatch(batch.inputs(), batch.span(), batch.targets()))
            valid = batch.predictions()
            loss = token_losses.sum() / valid
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
            peak = stage.config.optim.learning_rate
            for group in optimiser.param_groups:
                group["lr"] = peak * schedule(step, stage.run_steps)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    return losses, model.state_dict()


@pytest.fixture(scope="module")
def words(data) -> list[str]:
    return [*SMALL, *data, STAGES, "evaluation.every=100"]


@pytest.fixture(scope="module")
def hand(words):
    return by_hand(words)


def assert_is_the_run_by_hand(directory: Path, hand) -> None:
    losses, weights = hand
    rows = rows_of(directory)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["stage"] for row in rows] == [1] * 4 + [2] * 3 + [3] * 3
    for row, loss in zip(rows, losses, strict=True):
        assert abs(row["loss"] / loss - 1) < 1e-9, row["step"]
    saved = saved_weights(directory, 10)
    assert saved.keys() == weights.keys()
    for name, tensor in saved.items():
        assert torch.allclose(tensor, weights[name], rtol=0, atol=1e-9), name


def test_three_stages_on_one_two_and_three_ranks_equal_a_run_by_hand(words, hand, tmp_path):
    run = [*words, f"run_dir={tmp_path / 'run'}"]
    assert drive(run, tmp_path / "run") == (0, [1, 2, 3])
    assert_is_the_run_by_hand(tmp_path / "run", hand)
    evaluated = [row["step"] for row in read(tmp_path / "run" / "evaluation.jsonl")]
    assert evaluated == [4, 7, 10]
    ends = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")}
    # Beyond checkpoint.keep=2 those between stages stay.
    assert ends == {"step_00000004", "step_00000007", "step_00000008", "step_00000010"}


@pytest.mark.parametrize(
    "moment, resumed",
    [
        ("evaluation 4", [1, 2, 3]),  # the last step of a stage is saved and not evaluated
        # Evaluated, and stage.json does not say so.
        pytest.param("before-note 2", [1, 2, 3], marks=pytest.mark.full),
        # Between two stages.
        pytest.param("after-note 2", [2, 3], marks=pytest.mark.full),
        pytest.param("step 7", [2, 3], marks=pytest.mark.full),  # within the second
    ],
)
def test_a_kill_at_any_moment_resumes_in_the_right_stage(words, hand, tmp_path, moment, resumed):
    run = [*words, f"run_dir={tmp_path / 'run'}"]
    assert drive(run, tmp_path / "run", moment)[0] == "killed"
    assert drive(run, tmp_path / "run") == (0, resumed)
    assert_is_the_run_by_hand(tmp_path / "run", hand)
    evaluated = [row["step"] for row in read(tmp_path / "run" / "evaluation.jsonl")]
    assert evaluated == [4, 7, 10]


@pytest.mark.full
def test_a_damaged_checkpoint_leads_back_into_the_stage_before(words, hand, tmp_path):
    run = [*words, f"run_dir={tmp_path / 'run'}"]
    assert drive(run, tmp_path / "run", "step 6")[0] == "killed"
    handed_over = tmp_path / "run" / "checkpoints" / "step_00000004"
    shard = next(handed_over.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8] + bytes(8))
    # stage.json says 2, but the newest whole checkpoint is of step 2.
    assert json.loads((tmp_path / "run" / STATE).read_text())["stage"] == 2
    assert drive(run, tmp_path / "run") == (0, [2, 1, 2, 3])
    assert_is_the_run_by_hand(tmp_path / "run", hand)


def faults_of(*words: str, **settings) -> list[str]:
    composed = compose([*SMALL, *words])
    assert composed.config is not None
    return check_config(
        composed.config, composed.given, composed.mended, composed.faults, **settings
    )


@pytest.mark.parametrize(
    "stages, more, message",
    [
        (
            "{context_length:30,batch_tokens:100}",
            (),
            "stages.0.batch_tokens=100: must be a multiple of context_length=30",
        ),
        ("{context_length:30}", ("batch_tokens=100",), "stages.0: batch_tokens=100: must be a"),
        ("{stps:3}", (), "stages.0.stps=3: there is no such setting; did you mean stages.0.steps?"),
        ("{steps:0}", (), "stages.0.steps=0: it must be at least 1"),
        (
            "{parallel:{contxt:2}}",
            (),
            "stages.0.parallel.contxt=2: there is no such setting; did you mean"
            " stages.0.parallel.context?",
        ),
        ("{position:{thta:3.0}}", (), "stages.0.position.thta=3.0: Rope has no such setting"),
        (
            "{},{context_length:4096,position:{_target_:models.positions.learned.Learned}}",
            ("position=learned",),
            "stages.1: 1 tensors of its model are not those of stages.0, position.table.weight is"
            " [2048, 16] there and [4096, 16] here",
        ),
        ("{name:a},{name:a}", (), "stages.1.name=a: another stage has that name"),
        ("{},{}", ("checkpoint.every=0",), "checkpoint.every=0: a stage hands its state over"),
    ],
)
def test_a_stage_that_cannot_be_run_is_one_message(stages, more, message):
    faults = faults_of(f"stages=[{stages}]", *more)
    assert len(faults) == 1, faults
    assert faults[0].startswith(message), faults


def test_another_launcher_cannot_start_other_ranks_between_stages():
    faults = faults_of("stages=[{},{parallel:{context:3}}]", started=1, starter="torchrun")
    assert faults == [
        "stages.1.parallel=3: context=3 x data=1 is 3 ranks, but stages.0 has 1, and torchrun"
        " starts no others between stages; use python -m trainer, which does, or the same number"
        " of ranks in every stage"
    ]
    assert not faults_of("stages=[{},{context_length:1024}]", started=1, starter="torchrun")
    on_many = faults_of("stages=[{},{parallel:{context:3}}]", "launch=slurm")
    assert any("and launch=slurm starts no others between stages" in fault for fault in on_many)


def test_a_stage_reads_on_where_its_rows_are_those_of_the_stage_before(data):
    config = config_of([*SMALL, *data, "context_length=30", "batch_tokens=60"])
    stream = open_rows(config, "train")
    progress = Progress(stream.read(stream.start())[1], step=1, owed=["held_out"])
    progress.begin_stage(2, stream)
    assert (progress.cursor["rows"], progress.data_after, progress.owed) == (2, 0, [])
    longer = config.model_copy(update={"context_length": 60})
    progress.begin_stage(3, open_rows(longer, "train"))
    assert (progress.cursor["rows"], progress.data_after, progress.stage) == (0, 1, 3)


def test_a_schedule_lasts_for_the_run_or_for_each_stage():
    stages = "stages=[{steps:10},{steps:20}]"
    words = ("schedule=linear", "schedule.warmup_steps=2", stages)
    over_run = config_of(words)
    over_stage = config_of([*words, "schedule.over=stage"])
    factors = []
    for config in (over_run, over_stage):
        schedule = schedule_over(config, instantiate(config.schedule, {}, "schedule"))
        factors.append([round(schedule(step, 30), 6) for step in (1, 10, 11, 12, 30)])
    assert factors[0] == [0.5, round(1 - 8 / 28, 6), round(1 - 9 / 28, 6), round(1 - 10 / 28, 6), 0]
    assert factors[1] == [0.5, 0.0, 0.5, 1.0, 0.0]


def test_a_run_goes_on_with_more_stages_and_other_ranks_and_nothing_else(words, tmp_path):
    record(tmp_path, config_of(words))
    added = [*words, STAGES[:-1] + ",{steps:5}]"]
    assert other_run(config_of(added), tmp_path) == []
    moved = [*words, "stages.1.parallel.context=3", "stages.0.name=first"]
    assert other_run(config_of(moved), tmp_path) == []
    other = [*words, "stages.1.steps=9"]
    assert other_run(config_of(other), tmp_path) == [
        f"stages.1.steps=9: the run in {tmp_path} has stages.1.steps=3; use that value, or another"
        " run_dir"
    ]


def test_a_record_of_a_run_keeps_what_a_stage_left_out(words, tmp_path):
    config = config_of([*words, "parallel.layout=contiguous"])
    record(tmp_path, config)
    again = read_config(tmp_path)
    assert again == config
    assert [stage.config for stage in plan_of(again)] == [stage.config for stage in plan_of(config)]
    assert plan_of(again)[1].config.parallel.layout == "contiguous"


def test_a_carried_state_begins_empty_with_longer_rows_on_any_ranks(data, tmp_path):
    losses = []
    for context in (1, 3):
        stages = (
            "stages=[{steps:2,context_length:30,batch_tokens:60},{steps:3,context_length:62,"
            f"batch_tokens:124,parallel:{{context:{context}}}}}]"
        )
        run = [*SMALL, *data, stages, "memory=segments", "memory.length=16", "evaluation.every=0"]
        directory = tmp_path / str(context)
        assert drive([*run, f"run_dir={directory}"], directory)[0] == 0
        losses.append([row["loss"] for row in rows_of(directory)])
    assert len(losses[0]) == 5
    for here, there in zip(*losses, strict=True):
        assert abs(here / there - 1) < 1e-9


def test_a_stage_sets_single_settings_of_a_node_or_another_class(data):
    stages = (
        "stages=[{data:{path:'/other/*.txt'},position:{theta:50}},"
        "{data:{_target_:trainer.data.tasks.copy.CopyTask},"
        "position:{_target_:models.positions.ntk.Ntk,factor:2}}]"
    )
    first, second = (stage.config for stage in plan_of(config_of([*SMALL, *data, stages])))
    assert first.data.settings()["path"] == "/other/*.txt"
    assert first.data.settings()["cache"] == data[2].removeprefix("data.cache=")
    assert first.position.settings() == {"theta": 50.0}
    # Settings of another class are not taken over.
    assert second.data.settings() == {}
    assert second.position.settings() == {"factor": 2.0}
