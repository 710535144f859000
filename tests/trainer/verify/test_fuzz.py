"""The fuzzer sees what is wrong, and a part of what it tries is tried here."""

import os
import time
from random import Random

import pytest

from scripts.fuzz import wishes
from trainer.config import BAD_WISH, Config, Fault
from trainer.parity import write_documents
from trainer.verify import fuzz as fuzzing
from trainer.verify.crew import Crews
from trainer.verify.draw import draw_mistakes, draw_run
from trainer.verify.fuzz import Fuzz

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking a process that has threads


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    session = Fuzz(tmp_path, seed=0)
    yield session
    session.close()


def test_cases_are_functions_of_the_seed_and_the_number(tmp_path):
    documents = write_documents(tmp_path / "text")
    one, two = (draw_run(Random("run 0 7"), tmp_path, documents) for _ in range(2))
    assert one == two != draw_run(Random("run 0 8"), tmp_path, documents)
    assert draw_mistakes(Random("x"), ["a=1"]) == draw_mistakes(Random("x"), ["a=1"])
    drawn = [" ".join(draw_run(Random(str(n)), tmp_path, documents)[0]) for n in range(400)]
    for word in ("mixer=full", "mixer=mamba2", "position=t5", "memory=segments", "precision=float32", "evaluation.every=3"):
        assert any(word in line for line in drawn), word


@pytest.mark.slow
def test_some_runs_and_mistakes_are_as_promised(session):
    findings = [*session.runs(range(8)), *session.mistakes(range(8))]
    assert findings == []
    assert session.outcomes["equal"] and session.outcomes["refused"], session.outcomes


def _wrong(rank: int, config: Config, size: int, place) -> int:
    code = _live(rank, config, size, place)
    if size > 1 and rank == 0:
        path = place / "metrics.jsonl"
        path.write_text(path.read_text().replace('"loss": ', '"loss": 1'))
    return code


_live = fuzzing.live


@pytest.mark.slow
def test_a_run_that_differs_is_a_finding(session, monkeypatch):
    monkeypatch.setattr(fuzzing, "live", _wrong)
    common = ["precision=float64", "mixer=full", "data=files", f"data.path={session.documents}", "model.width=8"]
    common += ["model.heads=1", "evaluation.every=0", f"data.cache={session.folder / 'cache'}"]
    common += ["model.kv_heads=1", "context_length=8", "batch_tokens=16"]
    common += fuzzing.SMALL
    found = session._compare(0, common, ["parallel.context=2", "engine=single"], 2)
    assert found and "loss" in found and session.outcomes["differs"] == 1
    monkeypatch.setattr(fuzzing, "live", _live)
    assert session._compare(1, common, ["parallel.context=2", "engine=single"], 2) is None


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
    for told in ("2: ", "Traceback (most recent call last): ValueError", "2: it said Traceback (most recent"):
        assert session._refusal(told)


def test_wishes_that_the_command_does_not_know_are_named():
    assert wishes(["seed=3", "many=5"]) == {"seed": 3, "many": 5, "mistakes": 300}
    for word in ("seeds=1", "many=-1", "many=x", "many"):
        with pytest.raises(Fault, match="seed=NUMBER") as told:
            wishes([word])
        assert told.value.code == BAD_WISH
