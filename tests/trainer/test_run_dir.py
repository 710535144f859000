"""A run directory holds one run, with one launcher at a time, and says what ran."""

import fcntl
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from trainer import run_dir
from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.errors import UserError


def config(directory: Path, *words: str) -> Config:
    asked = compose([f"run_dir={directory}", *words])
    assert asked.config is not None
    return asked.config


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "first"
    path.mkdir()
    run_dir.record(path, config(path))
    return path


FREE = [
    "parallel.context=2",
    "engine.compile=true",
    "launch.grace_s=5",
    "log.every=3",
    "wandb.mode=offline",
]
FREE += ["checkpoint.every=7", "evaluation.every=0", "steps=500", "name=other"]


def test_a_run_goes_on_with_other_ranks_engine_and_logs(first: Path) -> None:
    assert run_dir.check_run_dir(config(first, *FREE)) == []


OTHER = [
    "seed=1",
    "batch_tokens=4096",
    "context_length=1024",
    "precision=float64",
    "model.width=64",
    "data.held_out=0.5",
]
OTHER += [
    "optim.max_grad_norm=0.5",
    "schedule.final_ratio=0.2",
    "position.theta=5.0",
    "memory.length=3",
]


@pytest.mark.parametrize("word", OTHER)
def test_another_run_is_refused_by_name_with_both_values(first: Path, word: str) -> None:
    key, _, value = word.partition("=")
    old = config(first).model_dump(by_alias=True)
    for part in key.split("."):
        old = old[part]
    found = run_dir.check_run_dir(config(first, word))
    assert len(found) == 1
    assert found[0].startswith(f"{key}={value}: the run in {first} has {key}={old}")


def test_another_mixer_is_refused(first: Path) -> None:
    assert any(
        each.startswith("mixer=") for each in run_dir.check_run_dir(config(first, "mixer=sliding"))
    )


def test_never_resuming_refuses_a_directory_with_a_run(first: Path, tmp_path: Path) -> None:
    assert "resume=never" in run_dir.check_run_dir(config(first, "resume=never"))[0]
    assert run_dir.check_run_dir(config(tmp_path / "empty", "resume=never")) == []


def test_resuming_from_a_path_needs_a_run_of_the_same_kind(first: Path, tmp_path: Path) -> None:
    (first / "checkpoints" / "step_00000003").mkdir(parents=True, exist_ok=True)
    fresh = tmp_path / "fresh"
    for source in (first, first / "checkpoints" / "step_00000003"):
        assert run_dir.check_run_dir(config(fresh, f"resume={source}")) == []
        assert "seed=5" in run_dir.check_run_dir(config(fresh, f"resume={source}", "seed=5"))[0]
    assert "no checkpoints/" in run_dir.check_run_dir(config(fresh, f"resume={tmp_path}"))[0]


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "it is a file" in run_dir.check_run_dir(config(tmp_path / "file"))[0]


def test_a_record_that_cannot_be_read_is_a_message(tmp_path: Path) -> None:
    (tmp_path / run_dir.CONFIG).write_text("steps: [")
    assert "cannot be read" in run_dir.check_run_dir(config(tmp_path))[0]


def test_a_directory_that_cannot_be_made_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        run_dir.make_run_dir(tmp_path / "file" / "run")


def _hold(path: Path, ready, leave) -> None:
    with run_dir.lock(path):
        ready.set()
        leave.wait(30)


def test_a_second_launcher_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    ready, leave = spawn.Event(), spawn.Event()
    process = spawn.Process(target=_hold, args=(tmp_path, ready, leave))
    process.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match=f"in use by process {process.pid}"), run_dir.lock(tmp_path):
        pass
    leave.set()
    process.join(30)
    with run_dir.lock(tmp_path):
        pass


def test_ranks_that_outlive_their_launcher_keep_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_dir, "DYING_S", 0.3)
    with (
        run_dir.presence(tmp_path),
        pytest.raises(UserError, match="still run here"),
        run_dir.lock(tmp_path),
    ):
        pass
    with run_dir.lock(tmp_path), run_dir.presence(tmp_path), run_dir.presence(tmp_path):
        pass  # any number of ranks, beside their own launcher


def test_a_lock_dies_with_its_file_descriptor(tmp_path: Path) -> None:
    file = os.open(tmp_path / run_dir.LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(UserError), run_dir.lock(tmp_path):
        pass
    os.close(file)
    with run_dir.lock(tmp_path):
        pass


def test_two_runs_in_one_second_get_two_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_dir.time, "strftime", lambda form: "20260101-000000")
    one = run_dir.fresh_path("run", tmp_path)
    one.mkdir(parents=True)
    assert run_dir.fresh_path("run", tmp_path).name == f"{one.name}-2"


def test_the_environment_is_recorded_without_any_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-of-forty-letters")
    run_dir.record(tmp_path, config(tmp_path))
    text = (tmp_path / run_dir.ENVIRONMENT).read_text()
    assert "a-secret" not in text
    found = json.loads(text)
    assert found["packages"]["torch"]
    assert {"commit", "diff", "python", "devices", "host", "cores"} <= found.keys()
