"""The fuzzer sees what is wrong, and a part of what it tries is tried here."""

import os
import time
from random import Random

import pytest

from parallel.drivers.scan import StatePassing
from scripts.fuzz import parse_words
from trainer.errors import BAD_CONFIG, BAD_RUN, UserError
from trainer.verify import fuzz as fuzzing
from trainer.verify.crew import Crews, run_in_lanes
from trainer.verify.draw import SMALL, Draw, draw_run, options
from trainer.verify.fuzz import Fuzz
from trainer.verify.fuzz_lanes import fuzz
from trainer.verify.mistype import draw_mistakes
from trainer.verify.whole_runs import write_documents

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # of forking a process that has threads
MANY = 4
MISTAKES = 5


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    session = Fuzz(tmp_path, seed=0)
    yield session
    session.close()


def test_cases_are_functions_of_the_seed_and_the_number_and_cover_what_there_is(tmp_path):
    documents = write_documents(tmp_path / "text")
    one, two = (draw_run(Random("run 0 7"), tmp_path, documents) for _ in range(2))
    assert one == two != draw_run(Random("run 0 8"), tmp_path, documents)
    assert draw_mistakes(Random("x"), ["a=1"]) == draw_mistakes(Random("x"), ["a=1"])
    draws = [draw_run(Random(str(n)), tmp_path, documents) for n in range(600)]
    drawn = {word for draw in draws for word in (*draw.common, *draw.spread, f"ranks {draw.ranks}")}
    for word in (
        *(f"mixer={name}" for name in options("mixer")),
        *(f"position={name}" for name in options("position")),
        *(f"memory={name}" for name in options("memory") if name != "none"),
        *(f"engine={name}" for name in ("single", "fsdp", "deepspeed")),
        *(f"precision={name}" for name in ("float64", "float32", "bfloat16")),
        *(f"parallel.layout={name}" for name in ("zigzag", "contiguous", "balanced")),
        *(f"ranks {number}" for number in (1, 2, 3, 4)),
        *("evaluation.every=3", "optim=muon", "objective=masked", "parallel.micro_batch=1"),
    ):
        assert word in drawn, word


@pytest.mark.slow
def test_some_runs_and_mistakes_are_as_promised(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said: list[str] = []
    assert fuzz(tmp_path, seed=0, runs=MANY, mistakes=MISTAKES, say=said.append) == []
    counts = {
        name: int(count) for count, _, name in (each.partition(" ") for each in said[0].split(", "))
    }
    assert (
        sum(count for name, count in counts.items() if name.startswith("equal")) >= 0.75 * MANY
    ), counts
    assert counts["passed and ran"] >= MISTAKES / 5 and counts["refused"], counts


def _drawn(monkeypatch, session, *more: str) -> None:
    """One run is drawn, whatever the number."""
    common = [
        *SMALL,
        "precision=float64",
        "data=files",
        f"data.path={session.documents}",
        "model.width=8",
    ]
    common += [
        "model.heads=1",
        "model.kv_heads=1",
        "evaluation.every=0",
        f"data.cache={session.folder / 'cache'}",
    ]
    common += ["context_length=8", "batch_tokens=16", *more]
    draw = Draw(common, ["parallel.context=2", "engine=single"], 2)
    monkeypatch.setattr(fuzzing, "draw_run", lambda *_: draw)


@pytest.mark.slow
def test_a_broken_driver_is_a_finding(session, monkeypatch):
    _drawn(monkeypatch, session, "mixer=linear")
    right = StatePassing.forward
    monkeypatch.setattr(
        StatePassing, "forward", lambda self, *args, **named: right(self, *args, **named) + 1e-5
    )
    (found,) = session.runs([0])
    assert "step 1: loss" in found.problem and session.outcomes["differs"] == 1
    session.close()  # ranks are forked anew, from what is whole
    monkeypatch.setattr(StatePassing, "forward", right)
    assert list(session.runs([1])) == [] and session.outcomes["equal in float64"] == 1


def test_a_step_without_a_target_has_no_loss_to_compare(session):
    config = session._checked(
        [*SMALL, "precision=float64", "data=files", f"data.path={session.documents}"]
    )
    row, none = {"loss": 5.0, "grad_norm": 1.0}, {"loss": None, "grad_norm": None}
    assert session._difference(config, [[row, none, row], [row, none, row]]) is None
    assert "step 2: loss None" in session._difference(config, [[row, none, row], [row, row, row]])


@pytest.mark.full
def test_a_run_that_its_data_ends_has_to_end_so_on_one_rank(session, monkeypatch):
    _drawn(
        monkeypatch,
        session,
        "mixer=bidirectional",
        "objective=masked",
        "objective.probability=0.001",
    )
    assert list(session.runs([0])) == [] and session.outcomes == {"ended with the same message": 1}
    session.close()
    monkeypatch.setattr(
        fuzzing,
        "live",
        lambda rank, config, size, heartbeat: size > 1 and _live(rank, config, size, heartbeat),
    )
    (found,) = session.runs([1])
    assert "no token to predict" in found.problem and "on one rank with False" in found.problem


_live = fuzzing.live


def _raise(*args, **named):
    raise ZeroDivisionError("a bug")


@pytest.mark.full
def test_a_trace_is_a_finding_in_the_check_in_a_run_and_in_what_follows_a_mistake(
    session, monkeypatch
):
    _drawn(monkeypatch, session, "mixer=full")
    monkeypatch.setattr(fuzzing, "draw_mistakes", lambda random, base: [*base, "steps=1"])
    for name, outcomes in (
        ("load_config", {"check broke": 2}),
        ("run", {"broke": 1, "passed and broke": 1}),
    ):
        session.outcomes.clear()
        session.close()
        with monkeypatch.context() as patch:
            patch.setattr(fuzzing, name, _raise)
            found = [*session.runs([0]), *session.mistakes([0])]
        assert ["ZeroDivisionError: a bug" in each.problem for each in found] == [True, True]
        assert session.outcomes == outcomes
    session.close()
    assert [*session.runs([1]), *session.mistakes([1])] == [] and session.outcomes[
        "passed and ran"
    ] == 1


def test_only_a_fault_of_data_disk_or_loss_may_end_a_run_that_passed_the_check(
    session, monkeypatch
):
    monkeypatch.setattr(fuzzing, "draw_mistakes", lambda random, base: [*base, "steps=1"])
    for code, expected in ((BAD_RUN, 0), (BAD_CONFIG, 1)):

        def end(*args, code=code):
            raise UserError("loss: it is not finite; use less", code)

        session.close()
        with monkeypatch.context() as patch:
            patch.setattr(fuzzing, "run", end)
            assert len(list(session.mistakes([0]))) == expected


def _number_of(take, tell, session, cases):
    while (number := take()) is not None:
        if cases[number] is None:
            raise KeyError("a bug")
        tell(cases[number] + session)


def test_lanes_take_every_case_once_and_one_that_breaks_is_heard():
    assert sorted(run_in_lanes(3, _number_of, 100, range(20))) == list(range(100, 120))
    with pytest.raises(RuntimeError, match="KeyError"):
        list(run_in_lanes(2, _number_of, 1, [1, None, 2]))


def _fail(rank: int) -> int:
    if rank == 1:
        raise ValueError("a bug")
    time.sleep(60)
    return rank


def _die(rank: int) -> None:
    print("last words", flush=True)
    os._exit(3)


def _number(rank: int, more: int) -> int:
    return rank + more


def test_a_crew_that_fails_dies_or_hangs_is_told_of_and_replaced(tmp_path):
    crews = Crews(tmp_path)
    try:
        assert crews.run(2, _number, 5).values == [5, 6]
        assert "ValueError: a bug" in crews.run(2, _fail, seconds=30).trace
        assert "last words" in crews.run(1, _die, seconds=30).trace
        late = crews.run(2, time.sleep, seconds=0.5)
        assert late.late and not late.values and "no answer" in late.trace
        assert crews.run(2, _number, 1).values == [1, 2]
    finally:
        crews.close()


def test_a_refusal_without_words_or_with_a_trace_is_a_finding(session):
    assert session._refusal("2: steps=0: use 1 or more") is None
    for told in (
        "2: ",
        "Traceback (most recent call last): ValueError",
        "2: it said Traceback (most recent",
    ):
        assert session._refusal(told)


def test_wishes_that_the_command_does_not_know_are_named():
    assert parse_words(["seed=3", "many=5"]) == {"seed": 3, "many": 5, "mistakes": 300}
    for word in ("seeds=1", "many=-1", "many=x", "many"):
        with pytest.raises(UserError, match="seed=NUMBER") as told:
            parse_words([word])
        assert told.value.code == BAD_CONFIG
