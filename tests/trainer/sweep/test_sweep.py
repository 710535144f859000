"""Sweeps: every combination runs once, in a directory of its own; one that fails is named and the
rest goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

from tests.support import forked_python
from tests.test_architecture import ROOT
from trainer.errors import UserError
from trainer.logs.figures import read_figures
from trainer.sweep.hydra_launcher import register
from trainer.sweep.jobs import Job, JobOutcome, essence, table, varied
from trainer.sweep.sweep import run_sweep
from trainer.verify.whole_runs import write_documents

SMALL = (
    "context_length=64",
    "batch_tokens=64",
    "model.width=16",
    "model.layers=1",
    "model.heads=2",
    "steps=2",
)
STUB = """
import json, os, signal, sys, time
from pathlib import Path
home, words = Path(sys.argv[1]), sys.argv[4:]
assert sys.argv[2] == "--job-of" and int(sys.argv[3]) == os.getppid()
told = dict(word.split("=", 1) for word in words)
place, seed = Path(told["run_dir"].strip("'")), int(told["seed"])
with open(home / "starts", "a") as file:
    file.write(f"{seed} {os.getpid()} {os.environ['OMP_NUM_THREADS']}\\n")
row = {"step": 1, "loss": 2.0 + seed, "tokens": 64, "peak_memory_bytes": 2**20}
row["tokens_per_second"] = 100.0 * seed
(place / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
result = {"step": 1, "name": "held_out_loss", "value": 3.0 + seed}
(place / "evaluation.jsonl").write_text(json.dumps(result) + "\\n")
if (home / f"wait{seed}").exists():
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    (home / f"waiting{seed}").touch()
    time.sleep(120)
if (home / f"fail{seed}").exists():
    print("some words\\nthe disk of this job is full")
    sys.exit(3)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "stub.py").write_text(STUB)
    return tmp_path


def run(home: Path, *words: str) -> int:
    command = [sys.executable, str(home / "stub.py"), str(home)]
    return run_sweep(["-m", *SMALL, f"hydra.sweep.dir={home / 'all'}", *words], command)


def starts(home: Path) -> list[int]:
    """The seeds that were started since the last look."""
    path = home / "starts"
    seeds = (
        [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []
    )
    path.unlink(missing_ok=True)
    return sorted(seeds)


def test_a_job_that_fails_is_named_and_the_rest_goes_on_and_only_it_runs_again(
    home: Path, capsys
) -> None:
    (home / "fail2").touch()
    assert run(home, "seed=1,2,3") == 1
    assert starts(home) == [1, 2, 3]
    told = capsys.readouterr()
    failed = "job 1 FAILED with exit status 3: the disk of this job is full; all it said is in"
    assert f"{failed} {home}/all/1/output.txt" in told.out
    assert "1 of 3 jobs not done (1)" in told.err
    assert f"-m {' '.join(SMALL)} seed=1,2,3 hydra.sweep.dir={home}/all" in told.err
    rows = [line.split() for line in told.out.splitlines() if line.startswith("| ")]
    assert [row[3] for row in rows[2:]] == ["seed=1", "seed=2", "seed=3"]
    assert [row[5] for row in rows[2:]] == ["3.0000", "4.0000", "5.0000"]
    assert json.loads((home / "all" / "1" / "outcome.json").read_text())["outcome"] == "failed"

    (home / "fail2").unlink()
    assert (
        run(home, "seed=1,2,3", "hydra.launcher.ranks=1", "wandb.mode=disabled", "log.plots=false")
        == 0
    )
    assert starts(home) == [2]
    told = capsys.readouterr()
    assert "2 of them done already" in told.out
    assert (home / "all" / "table.md").read_text().strip() in told.out
    assert run(home, "seed=1,2,3") == 0
    assert starts(home) == []


def detached(home: Path, *words: str) -> subprocess.Popen:
    """The sweep of `run` in a process of its own."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from trainer.sweep.sweep import run_sweep
sys.exit(run_sweep(sys.argv[1:], [sys.executable, {str(home / "stub.py")!r}, {str(home)!r}]))
"""
    words = ("-m", *SMALL, f"hydra.sweep.dir={home / 'all'}", *words)
    pipe = subprocess.PIPE
    return forked_python.Popen(
        [sys.executable, "-c", code, *words], stdout=pipe, stderr=pipe, text=True, cwd=ROOT
    )


def await_files(process: subprocess.Popen, *paths: Path) -> None:
    end = time.monotonic() + 90
    while not all(path.exists() for path in paths):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


def test_two_of_three_jobs_run_at_once_on_two_ranks_and_a_signal_stops_them_and_says_how_to_go_on(
    home: Path,
) -> None:
    for seed in (1, 2):
        (home / f"wait{seed}").touch()
    process = detached(home, "seed=1,2,3", "hydra.launcher.ranks=2")
    await_files(process, home / "waiting1", home / "waiting2")
    began = (home / "starts").read_text().splitlines()
    with pytest.raises(UserError, match=r"hydra\.sweep\.dir=.* is in use by process"):
        run(home, "seed=1,2,3")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "job 0 stopped" in out and "job 1 stopped" in out
    assert "3 of 3 jobs not done (0, 1, 2); to go on with those: python -m trainer -m" in err
    assert starts(home) == [1, 2]
    for line in began:
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[1]), 0)
    for seed in (1, 2):
        (home / f"wait{seed}").unlink()
    assert run(home, "seed=1,2,3") == 0
    assert starts(home) == [1, 2, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model=full,slidin",), "there is no model of that name; did you mean model=sliding?"),
        (("seed=1",), "no setting has several; write for example model=full,sliding"),
        (("seed=range(3,3)",), "no job comes of these settings"),
        (("mixer=full,sliding", "mixer.windwo=8"), "did you mean mixer.window"),
        (
            ("model.heads=2,3",),
            "model.width=16: must divide among model.heads=3; .* (job 1: model.heads=3)",
        ),
        (("seed=1,2", "run_dir=there"), "give the folder of all with hydra.sweep.dir=PATH"),
        (("seed=1,2", "hydra.sweep.subdir=same"), "is the folder of several jobs"),
        (("seed=1,2", "hydra/launcher=basic"), "of Hydra's settings a sweep takes"),
        (
            ("optim.learning_rate=interval(0.1,0.2)",),
            "intervals are for a search; add hydra/sweeper=optuna",
        ),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else "",
)
def test_a_bad_sweep_is_refused_before_any_job_starts(
    home: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(
        UserError, match=message.replace("(", "[(]").replace(")", "[)]").replace("?", "[?]")
    ):
        run(home, *words)
    assert starts(home) == []
    assert not (home / "all").exists()


def test_a_directory_of_another_sweep_or_of_something_else_is_refused(home: Path) -> None:
    assert run(home, "seed=1,2") == 0
    starts(home)
    with pytest.raises(
        UserError,
        match=r"holds the sweep .* seed=1,2; give those settings again, or another hydra.sweep.dir",
    ):
        run(home, "seed=1,2,3")
    with pytest.raises(UserError, match="holds something that is no sweep"):
        run_sweep(["-m", *SMALL, "seed=1,2", f"hydra.sweep.dir={home}"], ["false"])
    assert starts(home) == []


def test_a_dry_run_shows_every_job_and_starts_none(home: Path, capsys) -> None:
    assert run(home, "seed=1,2", "launch.dry_run=true", "parallel.context=2") == 0
    told = capsys.readouterr().out
    assert "job 1: 2 rank(s)" in told
    assert "nothing was started" in told
    assert starts(home) == []
    assert not (home / "all").exists()


class Halving(Sweeper):
    """A search as Hydra's are: what a batch of jobs returned decides over the next one."""

    def __init__(self, **settings) -> None:
        pass

    def setup(self, *, hydra_context, task_function, config) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        fixed = [each for each in arguments if "seed=" not in each]
        first = self.launcher.launch([[*fixed, "++seed=1"], [*fixed, "++seed=2"]], 0)
        most = max(range(2), key=lambda span: first[span].return_value)
        return self.launcher.launch([[*fixed, f"++seed={10 * (most + 1)}"]], 2)


def test_a_search_is_told_the_held_out_loss_of_its_jobs(home: Path, capsys) -> None:
    register(Halving, "tests")
    searching = ("seed=1,2", "hydra.sweeper._target_=hydra_plugins.tests.Halving")
    assert run(home, *searching) == 0
    assert starts(home) == [1, 2, 20]
    assert "seed=20" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"evaluation\.every=0, but a search goes by held-out loss"):
        run(home, *searching, "evaluation.every=0", f"hydra.sweep.dir={home / 'other'}")


def test_settings_that_all_jobs_share_are_left_out_of_their_names() -> None:
    jobs = [Job(0, ("++a=1", "b=x"), Path("0")), Job(1, ("++a=1", "b=y"), Path("1"))]
    assert varied(jobs) == {0: "b=x", 1: "b=y"}
    assert essence(["++a=1", "++wandb.mode=offline", "launch.grace_s=3"]) == ["a=1"]


def test_the_table_tells_of_jobs_without_figures(tmp_path: Path) -> None:
    jobs = [Job(0, ("a=1",), tmp_path / "0"), Job(1, ("a=2",), tmp_path / "1")]
    (tmp_path / "1").mkdir()
    JobOutcome(["a=2"], "failed", 3, 2.0, "why").write(tmp_path / "1")
    lines = table(jobs).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "not started" in lines[2]
    assert "failed (3)" in lines[3]
    assert str(read_figures(tmp_path / "0").loss) == "nan"


@pytest.mark.slow
def test_real_runs_of_which_the_last_fails_and_is_mended(tmp_path: Path) -> None:
    glob = write_documents(tmp_path / "text")
    words = (
        "-m",
        *(word for word in SMALL if not word.startswith("model.heads")),
        "mixer._target_=tests.support.breaking_data.BreakingJob",
        "+mixer.broken=false,true",
        "data=files",
        f"data.path={glob}",
        f"data.cache={tmp_path / 'cache'}",
        "wandb.mode=disabled",
        "log.plots=false",
        "checkpoint.every=0",
        "evaluation.every=2",
        "evaluation.batches=1",
        f"hydra.sweep.dir={tmp_path / 'all'}",
    )

    def go(**environment: str) -> subprocess.CompletedProcess:
        return forked_python.run(
            [sys.executable, "-m", "trainer", *words], cwd=ROOT, env={**os.environ, **environment}
        )

    first = go(BREAK="yes")
    assert first.returncode == 1, first.stdout + first.stderr
    assert "job 1 FAILED with exit status 1" in first.stdout
    assert first.stdout.count(" done: loss ") == 1
    second = go()
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count(" starts: ") == 1 and "job 1 done" in second.stdout
    assert all((tmp_path / "all" / str(number) / "config.yaml").is_file() for number in range(2))
