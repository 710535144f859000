"""A symbolic link in a run directory turns no write and no read elsewhere; of two runs that want a
name one gets it."""

import json
import os
from pathlib import Path

import pytest
import torch

from scripts import report as report_command
from tests.trainer.verify.test_killed import words
from trainer import run_dir
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.writer import CheckpointWriter
from trainer.errors import UserError
from trainer.files import safe_files
from trainer.logs import plots, summary
from trainer.logs.jsonl import METRICS, Lines, read
from trainer.logs.wandb import identity_of
from trainer.preflight import prepare
from trainer.sweep.jobs import OUTCOME, JobOutcome

SECRET = "what lies outside\n"


@pytest.fixture
def outside(tmp_path):
    """A file and a folder beside the run directory that nothing may touch."""
    place = tmp_path / "outside"
    place.mkdir()
    (place / "file").write_text(SECRET)
    yield place
    assert (place / "file").read_text() == SECRET and [path.name for path in place.iterdir()] == [
        "file"
    ]


@pytest.fixture
def run(tmp_path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def row(step: int) -> str:
    return json.dumps({"step": step, "loss": 1.0, "tokens": 4}) + "\n"


WRITES = {
    run_dir.LOCK: lambda run: run_dir.lock(run).__enter__(),
    run_dir.RANKS_LOCK: lambda run: run_dir.presence(run).__enter__(),
    METRICS: lambda run: Lines(run / METRICS),
    "checkpoints": lambda run: CheckpointWriter(run / "checkpoints", say=lambda text: None),
    "report": lambda run: safe_files.make_inside(run, "report"),
    "report/": lambda run: safe_files.replace_inside(run, "report/loss.png", b"x"),
}


@pytest.mark.every_case
@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("dangling", [False, True])
def test_what_is_a_link_is_not_written_through(name, dangling, run, outside):
    target = (
        outside / "nothing"
        if dangling
        else outside
        if "." not in name and name != METRICS
        else outside / "file"
    )
    (run / name.rstrip("/")).symlink_to(target)
    with pytest.raises((UserError, OSError), match="symbolic link"):
        WRITES[name](run)


REPLACED = {
    run_dir.CONFIG: lambda run: safe_files.replace_inside(run, run_dir.CONFIG, "a: 1\n"),
    summary.SUMMARY: lambda run: summary.note(run, ranks=2),
    OUTCOME: lambda run: JobOutcome([], "done", 0, 1.0).write(run),
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_replaced_whole_replaces_a_link(name, run, outside):
    (run / name).symlink_to(outside / "file")
    for suffix in (".new", ".tmp"):
        (run / f".{name}{suffix}").symlink_to(outside / "file")
    REPLACED[name](run)
    assert not (run / name).is_symlink() and (run / name).stat().st_size


def test_names_of_what_is_written_beside_cannot_be_foreseen(run, monkeypatch):
    seen = []
    rename = os.rename
    monkeypatch.setattr(
        safe_files.os, "rename", lambda a, b, **where: (seen.append(a), rename(a, b, **where))
    )
    for _ in range(3):
        safe_files.replace_inside(run, "x", "y")
    assert len(set(seen)) == 3 and all(len(name) > 16 for name in seen)
    assert [path.name for path in run.iterdir()] == ["x"]


def test_rows_that_are_cut_back_do_not_follow_a_link_put_beside(run, outside):
    (run / METRICS).write_text(row(1) + row(2))
    (run / f".{METRICS}.tmp").symlink_to(outside / "file")
    lines = Lines(run / METRICS)
    assert lines.truncate_after(1) == 1
    lines.close()
    assert (run / METRICS).read_text() == row(1)


def test_reading_follows_no_link(run, outside):
    (outside / "file").write_text(row(1))
    try:
        for name in (METRICS, run_dir.CONFIG, summary.SUMMARY):
            (run / name).symlink_to(outside / "file")
        (run / "wandb").symlink_to(outside)
        with pytest.raises(OSError, match="symbolic link"):
            list(read(run / METRICS))
        with pytest.raises(ValueError, match="symbolic link"):
            run_dir.read_config(run)
        with pytest.raises(ValueError, match="symbolic link"):
            summary.read(run)
        with pytest.raises(OSError, match="symbolic link"):
            identity_of(run)
    finally:
        (outside / "file").write_text(SECRET)


def test_a_checkpoint_that_is_a_link_is_none(run, outside, tmp_path):
    checkpoints = CheckpointWriter(tmp_path / "other" / "checkpoints", say=lambda text: None)
    checkpoints.save(1, {"model": {"w": torch.ones(2)}}, {})
    checkpoints.close()
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step_00000001").symlink_to(
        tmp_path / "other" / "checkpoints" / "step_00000001"
    )
    with pytest.raises(UserError, match="is whole"):
        CheckpointReader(run / "checkpoints", say=lambda text: None).latest()
    (run / "checkpoints" / ".step_00000002.gone-ff").symlink_to(outside)
    CheckpointWriter(run / "checkpoints", say=lambda text: None).close()
    whole = tmp_path / "linked"
    whole.mkdir()
    (whole / "checkpoints").symlink_to(tmp_path / "other" / "checkpoints")
    with pytest.raises(UserError, match="symbolic link"):
        CheckpointReader(whole / "checkpoints", say=lambda text: None).latest()


def test_pictures_and_pages_are_not_drawn_through_links(run, outside):
    (run / METRICS).write_text(row(1) + row(2))
    (run / "report").mkdir()
    for name in ("loss.png", "index.html", "variants.md", ".index.html.new", "curves.png"):
        (run / "report" / name).symlink_to(outside / "file")
    plots.plots(run)
    assert report_command.main([str(run)]) == 0
    assert not [
        path for path in (run / "report").iterdir() if path.is_symlink() and path.name[0] != "."
    ]


@pytest.mark.parametrize(
    "name", ["checkpoints", "report", "wandb", ".launch", "sample.txt", "report/curves.png"]
)
def test_a_run_directory_with_a_link_is_refused_before_anything_is_written(name, tmp_path, outside):
    wish = words(tmp_path, "run", "engine=single")
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(UserError, match=r"run_dir=.*is a symbolic link.*choose another run_dir"):
        prepare.load_config(wish)


def test_what_wandb_links_within_its_own_folder_is_its_own(run, tmp_path, outside):
    (run / "wandb" / "offline-run").mkdir(parents=True)
    (run / "wandb" / "latest-run").symlink_to("offline-run")
    (tmp_path / "elsewhere").symlink_to(run)
    assert safe_files.links_inside(tmp_path / "elsewhere") == []


def test_of_runs_that_want_one_name_each_makes_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir.time, "strftime", lambda form: "20260101-000000")
    monkeypatch.setattr(
        run_dir.os.path, "lexists", lambda path: False
    )  # as all saw it before any of them made it
    paths = [run_dir.take("run", tmp_path) for _ in range(3)]
    assert len(set(paths)) == 3 and all(path.is_dir() for path in paths)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run_dir.take("run", tmp_path / "file")
