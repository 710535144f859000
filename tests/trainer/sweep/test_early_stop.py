"""`hydra.launcher.stop_early`: jobs that lose are stopped and not run again, through Optuna."""

import json
import sys
from pathlib import Path

import pytest

from tests.trainer.sweep.test_sweep import SMALL
from trainer.errors import UserError
from trainer.sweep import early_stop, process_pool
from trainer.sweep.early_stop import EarlyStop
from trainer.sweep.sweep import run_sweep

# Evaluates nine times, a held-out loss of its seed, and saves when it is stopped. Seed 1, the best,
# comes first, as the first job is always among the best.
STUB = """
import json, signal, sys, time
from pathlib import Path
home = Path(sys.argv[1])
told = dict(word.split("=", 1) for word in sys.argv[4:])
place, seed = Path(told["run_dir"].strip("'")), int(told["seed"])
def saved(number, frame):
    (place / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, saved)
with open(home / "starts", "a") as file:
    file.write(f"{seed}\\n")
with open(place / "evaluation.jsonl", "a") as file:
    for step in range(1, 10):
        row = {"step": step, "name": "held_out_loss", "value": float(seed) + 1 / step}
        file.write(json.dumps(row) + "\\n")
        file.flush()
        time.sleep(0.2 if seed == 1 else 0.4)
"""


def evaluated(folder: Path, losses: list[float]) -> None:
    folder.mkdir(exist_ok=True)
    rows = [
        {"step": step, "name": "held_out_loss", "value": loss}
        for step, loss in enumerate(losses, 1)
    ]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_of_each_rung_the_best_go_on(tmp_path: Path) -> None:
    folders = {number: tmp_path / str(number) for number in range(4)}
    halving = EarlyStop(2, folders)
    # In order of coming: the best so far goes on, as does what is among the better half.
    for number, loss in enumerate((2.0, 3.0, 1.0, 2.5)):
        evaluated(folders[number], [loss])
    assert list(halving.look(folders)) == [1, 3]
    # Each is named once, and the other rungs count too.
    evaluated(folders[0], [2.0, 1.5])
    evaluated(folders[2], [1.0, 1.9])
    assert list(halving.look([0, 1, 2, 3])) == [2]
    assert list(halving.look([0, 1, 2, 3])) == []


def test_a_file_that_cannot_be_read_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "evaluation.jsonl").write_text("x\ny\n")
    assert list(EarlyStop(2, {0: tmp_path}).look([0])) == []


def test_jobs_that_lose_save_and_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(process_pool, "POLL_S", 0.05)
    (tmp_path / "stub.py").write_text(STUB)
    command = [sys.executable, str(tmp_path / "stub.py"), str(tmp_path)]
    words = ["-m", *SMALL, f"hydra.sweep.dir={tmp_path / 'all'}", "hydra.launcher.ranks=1"]
    words += ["hydra.launcher.stop_early=2", "seed=1,2,3"]
    assert run_sweep(words, command) == 0
    outcomes = [
        json.loads((tmp_path / "all" / str(job) / "outcome.json").read_text()) for job in range(3)
    ]
    assert [each["outcome"] for each in outcomes] == ["done", "stopped early", "stopped early"]
    assert (tmp_path / "all" / "1" / "saved").exists()
    assert "stopped early" in capsys.readouterr().out
    (tmp_path / "starts").unlink()
    assert run_sweep(words, command) == 0
    assert not (tmp_path / "starts").exists()


def test_what_cannot_be_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["-m", *SMALL, f"hydra.sweep.dir={tmp_path / 'all'}", "seed=1,2"]
    with pytest.raises(UserError, match=r"stop_early=1: one in so many jobs goes on; use 2"):
        run_sweep([*words, "hydra.launcher.stop_early=1"], ["false"])
    with pytest.raises(UserError, match=r"held-out loss, and so does stop_early"):
        run_sweep([*words, "hydra.launcher.stop_early=2", "evaluation.every=0"], ["false"])
    monkeypatch.setattr(early_stop, "MODULE", "no_such_package")
    with pytest.raises(UserError, match="needs the package optuna"):
        EarlyStop(2, {})
