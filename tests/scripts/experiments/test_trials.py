"""Lessons, tables and the recipe of recall: what is trained is what is examined, and one failure
stops nobody."""

import math
from dataclasses import replace

import pytest

from scripts.experiments import memory, recall
from scripts.experiments.__main__ import RECIPES, effort, main
from scripts.experiments.decoding import held_bytes
from scripts.experiments.runner import Budget, run_trials
from scripts.experiments.table import table
from scripts.experiments.trial import HELD_OUT, Trial, TrialResult, run_trial
from trainer.errors import UserError
from trainer.evaluation.held_out import HeldOutResult
from trainer.logs.jsonl import MetricsRow
from trainer.preflight.prepare import load_config
from trainer.preflight.reach import fitting

TINY = (
    "model=decoder",
    "mixer=full",
    "model.width=16",
    "model.layers=2",
    "model.heads=2",
    "model.ffn=1.0",
    "data=recall",
)
TASK = (
    "data.pairs=1",
    "data.keys=2",
    "data.values=2",
    "data.length=4",
    "context_length=4",
    "batch_tokens=128",
)
RECALL = Trial(
    "full", (*TINY, *TASK, "steps=60", "optim.learning_rate=0.03", "schedule.warmup_steps=5")
)

ROW = MetricsRow(1, 1.0, 1, 1.0, 1.0, 1.0, 0.01, 1, None)


def learned(
    name: str, seed: int, accuracy: float = 0.5, loss: float = 1.0, fault: str | None = None
) -> TrialResult:
    return TrialResult(
        name, seed, {HELD_OUT: HeldOutResult(loss, 1, [], {"accuracy": accuracy})}, fault=fault
    )


def test_a_lesson_learns_and_is_examined_as_asked() -> None:
    longer = replace(RECALL, exams={"longer": ("data.length=8", "context_length=8")})
    found = run_trial(longer, seed=1)
    assert [row.step for row in found.rows] == list(range(1, 61))
    assert found.rows[0].loss > 1 and found.loss < 0.1 and found.accuracy == 1
    assert set(found.exams) == {HELD_OUT, "longer"} and found.exams["longer"].tokens == 8 * 16
    assert found.parameters == 2 * (4 * 16 * 16 + 3 * 16 * 16) + 5 * 16 + 5 * 16


@pytest.mark.full
def test_a_lesson_is_a_function_of_its_seed() -> None:
    few = replace(RECALL, overrides=(*RECALL.overrides, "steps=3"))
    losses = [[row.loss for row in run_trial(few, seed).rows] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_a_lesson_that_cannot_be_is_a_fault() -> None:
    with pytest.raises(UserError, match=r"data\.pairs=3"):
        run_trial(replace(RECALL, overrides=(*RECALL.overrides, "data.pairs=3")), seed=0)


@pytest.mark.slow
def test_lessons_come_back_in_order_and_a_failed_one_stops_no_other() -> None:
    lines: list[str] = []
    wrong = replace(RECALL, name="wrong", overrides=(*RECALL.overrides, "data.pairs=3"))
    found = run_trials(
        [(RECALL, 0), (wrong, 0), (RECALL, 1)], Budget(jobs=1, steps=2), lines.append
    )
    assert [(each.name, each.seed, len(each.rows)) for each in found] == [
        ("full", 0, 2),
        ("wrong", 0, 0),
        ("full", 1, 2),
    ]
    assert [each.fault is None for each in found] == [True, False, True]
    assert len(lines) == 3 and "wrong, seed 0: FAILED: UserError: data.pairs=3" in lines[1]


def test_a_table_shows_the_mean_and_between_what_the_seeds_lay() -> None:
    seeds = [
        learned("a", 0, 0.5),
        learned("b", 0, 0.25),
        learned("a", 1, 1.0),
        learned("a", 2, fault="died"),
    ]
    shown = table(
        seeds,
        {
            "accuracy": lambda each: each.accuracy,
            "none": lambda each: math.nan,
            "what": lambda each: "x",
        },
    )
    assert shown.splitlines() == [
        "| model | accuracy | none | what | seeds |",
        "| --- | --- | --- | --- | --- |",
        "| a | 0.750 (0.500 to 1.000) | - | x | 2 (1 failed) |",
        "| b | 0.250 | - | x | 1 |",
    ]


def test_every_lesson_is_taught_with_the_seeds_that_were_asked_for(monkeypatch) -> None:
    asked: list[tuple[str, int]] = []

    def pretend(jobs, effort, say):
        jobs = list(jobs)
        asked.extend((lesson.name, seed) for lesson, seed in jobs)
        held, far = (
            HeldOutResult(1.0, 1, [], {"accuracy": 0.5}),
            HeldOutResult(1.0, 1, [], {"accuracy": 0.25}),
        )
        return [
            TrialResult(lesson.name, seed, {HELD_OUT: held, **dict.fromkeys(lesson.exams, far)})
            for lesson, seed in jobs
        ]

    monkeypatch.setattr(recall, "run_trials", pretend)
    monkeypatch.setattr(recall, "_decoding", lambda: "bytes")
    text, found = recall.recall(Budget(seeds=2, first=3), lambda line: None)
    every = [lesson.name for lesson in (*recall._remembering(), *recall._tracking())]
    assert asked == [(name, seed) for name in every for seed in (3, 4)] and len(found) == len(asked)
    assert "| rwkv7, rates to 2 | 0.500 (0.500 to 0.500) | 0.250 (0.250 to 0.250) | 2 |" in text


def test_a_part_of_a_recipe_is_taught_and_told_alone(monkeypatch) -> None:
    asked: list[str] = []
    graded = {"accuracy": 0.5, "wrong_bits": 0.25}

    def pretend(jobs, effort, say):
        jobs = list(jobs)
        asked.extend(lesson.name for lesson, _ in jobs)
        exam = HeldOutResult(1.0, 1, [], graded)
        return [
            TrialResult(lesson.name, seed, dict.fromkeys([HELD_OUT, *lesson.exams], exam))
            for lesson, seed in jobs
        ]

    monkeypatch.setattr(memory, "run_trials", pretend)
    monkeypatch.setattr(recall, "run_trials", pretend)
    text, _ = memory.memory(Budget(seeds=1, only="copying"), print)
    assert set(asked) == {lesson.name for lesson in memory._copying()} and text.count("### ") == 1
    assert "| NTM, trained to 10 | 0.2500 |" in text
    whole, learned = memory.memory(Budget(seeds=2), print)
    assert whole.count("### ") == len(memory.SHOWN) and len(learned) == 2 * sum(
        len(part) for part in (memory.TEXT, memory._retrieval(), memory._copying(), memory._facts())
    )
    assert "| rows of 32 bytes | 1.443 (1.443 to 1.443) | - | - | 2 |" in whole
    del asked[:]
    text, _ = recall.recall(Budget(seeds=1, only="tracking"), print)
    assert asked == [lesson.name for lesson in recall._tracking()] and text.startswith(
        recall.TRACKED
    )
    for _, parts, _ in RECIPES.values():
        for part in parts:
            assert effort([f"only={part}"], parts).only == part


# A lesson is composed for half a second: `make test` takes one of eight.
EVERY = [pytest.param(1, marks=pytest.mark.full), 8]


@pytest.mark.parametrize("step", EVERY)
def test_the_lessons_on_memory_can_be_honoured(step: int) -> None:
    for part in (memory.TEXT, memory._retrieval(), memory._copying(), memory._facts()):
        examined: set[str] = set()
        for lesson in part[::step]:
            # The exams of a part are much the same for all its models.
            exams = {name: more for name, more in lesson.exams.items() if name not in examined}
            examined |= exams.keys()
            for more in ((), *exams.values()):
                assert load_config(fitting((*lesson.overrides, *more))).steps > 1


@pytest.mark.parametrize("step", EVERY)
def test_the_family_is_whole_and_every_lesson_of_it_can_be_honoured(step: int) -> None:
    lessons = [*recall._remembering(), *recall._tracking()]
    behind = {
        f"conv + {name}" for name in ("full", "linear", "performer", "retention", "gated_linear")
    }
    alone = {
        "full",
        "linear",
        "rwkv6",
        "rwkv7",
        "delta",
        "gated_delta",
        "mamba2",
        "hyena",
        "short_conv",
    }
    assert behind | alone <= {lesson.name for lesson in lessons}
    for lesson in lessons[::step]:
        assert load_config(fitting(lesson.overrides)).steps > 1


def test_decoding_holds_what_a_state_takes_whatever_was_read_and_what_keys_and_values_take() -> (
    None
):
    sizes = ("model=decoder", "model.width=16", "model.layers=2", "model.heads=2")
    assert held_bytes((*sizes, "mixer=retention"), (512, 1536)) == [2 * 2 * 8 * 16 * 4] * 2
    assert held_bytes((*sizes, "mixer=full"), (512, 1536)) == [
        2 * 2 * 16 * 4 * 512,
        2 * 2 * 16 * 4 * 1536,
    ]
    windows = 2 * 3 * 3 * 16 * 4  # in two layers, three tokens of three short convolutions
    assert (
        held_bytes((*sizes, "mixer=gated_delta"), (512, 1536)) == [2 * 2 * 8 * 8 * 4 + windows] * 2
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recal"], "recal: there is no such recipe; known:\n    recall"),
        (["recall", "seed=3"], "seed=3: there is no such setting; known: seeds=, jobs="),
        (
            ["recall", "only=copying"],
            "only=copying: there is no such part; known: queries, tracking, decoding",
        ),
        (["experts", "only=text"], "known: none, leave only= out"),
        (["recall", "jobs=0"], "jobs=0: a whole number of 1 or more"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_with_what_can(words, said, capsys) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_words_become_an_effort() -> None:
    assert effort(["seeds=1", "steps=9", "first=0"]) == Budget(seeds=1, jobs=2, steps=9, first=0)
