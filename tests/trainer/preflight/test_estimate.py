"""The estimate of disk is that of a real run, and that of time says what it goes by."""

import json
import re
from pathlib import Path

import pytest

from tests.support.pool import ranks
from tests.trainer import test_every_yaml
from tests.trainer.test_every_yaml import in_rank
from trainer.config.stages import plan_of
from trainer.preflight.estimate import checkpoint_bytes, checkpoints_kept, estimate_lines
from trainer.preflight.prepare import load_config
from trainer.run_dir import make_run_dir, record

BYTES = re.compile(r"([\d.]+) (TB|GB|MB|kB|B): (\d+) checkpoints? of ([\d.]+) (TB|GB|MB|kB|B) stay")
COMMON = (*test_every_yaml.COMMON, "evaluation.every=1")
UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "words",
    [
        ("precision=float32", "checkpoint.keep=2", "checkpoint.keep_every=2"),
        ("precision=float64", "optim=muon", "checkpoint.keep=1", "checkpoint.keep_best=1"),
        ("precision=bfloat16", "optim.freeze=[blocks.0.*]", "checkpoint.keep=1"),
    ],
)
def test_a_run_takes_the_disk_that_was_estimated(tmp_path: Path, words: tuple[str, ...]) -> None:
    path = tmp_path / "run"
    settings = [*COMMON, "steps=5", "data=copy", "model.width=64", "launch.timeout_s=60", *words]
    config = load_config([*settings, f"run_dir={path}", "engine=single", "logger=[]"])
    make_run_dir(path)
    [line] = [line for line in estimate_lines(config) if line.startswith("disk")]
    assert ranks(1, in_rank, config, str(path)) == [0]
    found = BYTES.search(line)
    assert found is not None, line
    there = [each for each in (path / "checkpoints").iterdir() if each.name.startswith("step_")]
    # Of the best one it is not known before whether it is among the newest.
    assert int(found[3]) - config.checkpoint.keep_best <= len(there) <= int(found[3])
    assert float(found[4]) * UNITS[found[5]] == pytest.approx(used(there[0]), rel=0.05)
    real = used(path / "checkpoints") + (path / "metrics.jsonl").stat().st_size
    if not config.checkpoint.keep_best:
        assert float(found[1]) * UNITS[found[2]] == pytest.approx(real, rel=0.05)


def test_kept_checkpoints_are_counted_by_every_rule() -> None:
    def kept(*words: str) -> int:
        config = load_config([*COMMON, "data=copy", "checkpoint.every=10", *words])
        return checkpoints_kept(config, plan_of(config))

    assert kept("steps=100", "checkpoint.keep=2") == 2
    assert kept("steps=100", "checkpoint.keep=2", "checkpoint.keep_every=50") == 3
    assert kept("steps=105", "checkpoint.keep=1", "checkpoint.keep_every=20") == 6
    assert kept("steps=10", "checkpoint.keep=2", "checkpoint.keep_best=3") == 1


def test_time_is_that_of_a_run_with_the_same_steps_and_otherwise_not_known(tmp_path: Path) -> None:
    words = [*COMMON, "data=copy", "steps=1000"]
    config = load_config([*words, f"run_dir={tmp_path / 'new'}"])
    [line, _] = estimate_lines(config)
    assert line.startswith(f"time     not known: no run in {tmp_path} has such steps")
    assert f"run_dir={tmp_path / 'timed'} " in line
    measuring = ["steps=5", "checkpoint.every=0", "evaluation.every=0"]
    for name, more in (("other", ["model.width=32"]), ("timed", measuring)):
        folder = tmp_path / name
        folder.mkdir()
        record(folder, load_config([*words, *more, f"run_dir={folder}"]))
        seconds = (9.0, 2.0, 2.0, 2.5) if name == "timed" else (5.0, 5.0, 5.0)
        rows = [{"step": step, "step_seconds": each} for step, each in enumerate(seconds, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("{")
    [line, _] = estimate_lines(config)
    assert line.startswith("time     33:20 ") and f"{tmp_path / 'timed'} (3 steps)" in line


def test_a_run_without_checkpoints_takes_none() -> None:
    config = load_config([*COMMON, "data=copy", "checkpoint.every=0"])
    assert "no checkpoint (checkpoint.every=0)" in list(estimate_lines(config))[1]
    assert checkpoint_bytes(config) > 0
