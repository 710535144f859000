"""What W&B is told of a run: the config first, then W&B's own variables; what it would not take is
refused before the start."""

import os
import tempfile
from pathlib import Path

import pytest

from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.logs import scratch
from trainer.logs.alerts import Alerts
from trainer.logs.console import Console
from trainer.logs.jsonl import MetricsRow
from trainer.logs.labels import Labels, labels
from trainer.logs.loggers.wandb import Wandb
from trainer.logs.run_logger import RunLogger
from trainer.preflight.check import check_config
from trainer.sweep.batch import labels as sweep_labels
from trainer.watchdog import Hang

VARIABLES = {
    "WANDB_PROJECT": "theirs",
    "WANDB_ENTITY": "team",
    "WANDB_NAME": "a name",
    "WANDB_TAGS": "one, two",
    "WANDB_NOTES": "why",
    "WANDB_RUN_GROUP": "lot",
}
WORDS = [
    "wandb.project=p",
    "wandb.entity=e",
    "wandb.name=n",
    "wandb.tags=[t]",
    "wandb.notes=x",
    "wandb.group=g",
    "wandb.id=i",
]


@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    """A user without W&B settings."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def config(*words: str) -> Config:
    asked = compose(["name=mine", *words])
    assert asked.config is not None, asked.faults
    return asked.config


def test_variables_count_where_the_config_says_nothing(monkeypatch, tmp_path):
    assert labels(config()) == Labels("longspan", "mine")
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    shown = labels(config())
    assert shown == Labels("theirs", "a name", "team", "lot", ("one", "two"), "why", None, tmp_path)
    assert labels(config(*WORDS)) == Labels("p", "n", "e", "g", ("t",), "x", "i", tmp_path)


def test_a_sweep_names_its_jobs_only_where_nobody_did(monkeypatch):
    assert len(sweep_labels(config(), ["seed=1"], "folder")) == 3
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert sweep_labels(config(), ["seed=1"], "folder") == []


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("wandb.project=team/project", "use wandb.project=project wandb.entity=team"),
        ("wandb.project='a:b'", "none of / \\ # ? % :"),
        ("wandb.entity=a/b", "wandb.entity=a/b: "),
        ("wandb.id=a/b", "wandb.id=a/b: an id has letters"),
        (f"wandb.project={'x' * 129}", "it has 129 characters, but W&B takes 128"),
    ],
)
def test_what_wandb_would_not_take_is_refused(word, message):
    faults = check_config(config(word))
    assert len(faults) == 1 and message in faults[0]
    assert check_config(config(word, "wandb.mode=disabled")) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WANDB_PROJECT", "team/project", "WANDB_PROJECT=team/project: "),
        ("WANDB_TAGS", "ok," + "t" * 65, "it has 65 characters"),
        ("WANDB_RUN_ID", "a/b", "WANDB_RUN_ID=a/b: an id"),
        ("WANDB_DIR", "/proc/nowhere/x", "WANDB_DIR=/proc/nowhere/x: /proc cannot be written to"),
    ],
)
def test_a_variable_that_wandb_would_not_take_is_refused_by_its_name(
    monkeypatch, name, value, message
):
    monkeypatch.setattr(os, "access", lambda place, mode: not str(place).startswith("/proc"))
    monkeypatch.setenv(name, value)
    faults = check_config(config())
    assert len(faults) == 1 and message in faults[0]


def row(step: int, norm: float = 1.0, skipped=None) -> MetricsRow:
    return MetricsRow(step, 1.0, 64 * step, 1.0, 1.0, norm, 1e-3, 1, None, skipped=skipped)


def test_alerts_tell_of_spikes_skips_hangs_and_the_end_and_of_nothing_else():
    sent: list[tuple[str, str]] = []
    alerts = Alerts(True, "mine", 0.0, lambda *alert: sent.append(alert))
    for step in range(1, 31):
        alerts.step(row(step, 1.0 + step % 3))
    assert sent == []
    alerts.step(row(31, 100.0))
    alerts.step(row(32, float("nan"), {"why": "the loss is nan"}))
    alerts.hung("rank 1 did not come; token=S3cr3t")
    alerts.ended("finished", "loss 1")
    assert [title for title, _ in sent] == [
        "gradient spike: mine",
        "step skipped: mine",
        "ranks hang: mine",
        "finished: mine",
    ]
    assert "S3cr3t" not in str(sent) and "step 31: gradient norm 100" in sent[0][1]
    quiet = Alerts(["end"], "mine", 0.0, lambda *alert: sent.append(alert))
    quiet.hung("x")
    quiet.step(row(1, 1.0, {"why": "x"}))
    assert len(sent) == 4
    assert Alerts(False, "mine", 0.0, print).wanted == frozenset()


class Sent:
    """In the place of a W&B run."""

    def __init__(self):
        self.alerts: list[tuple[str, str]] = []
        self.finished: list[int] = []

    def alert(self, title: str, text: str) -> None:
        self.alerts.append((title, text))

    def finish(self, summary, exit_code: int = 0, wait_s: float | None = None) -> None:
        self.finished.append(exit_code)


@pytest.mark.parametrize(
    ("error", "titles"),
    [
        (Hang("rank 1 of 2 did not come"), ["ranks hang: mine", "failed: mine"]),
        (UserError("the disk is full", 3), ["failed: mine"]),
        (RuntimeError("a bug"), ["failed: mine"]),
    ],
)
def test_a_run_that_ends_badly_says_so_before_its_process_goes(tmp_path, error, titles):
    logs = RunLogger(tmp_path, config("wandb.alerts=true"), Console(2, speaks=False), writes=True)
    sent = Sent()
    wandb = Wandb()
    wandb.run = sent
    logs._add("wandb", wandb)
    logs.alerts = Alerts(True, "mine", 0.0, sent.alert)
    with pytest.raises(type(error)), logs.alerting():
        raise error
    assert [title for title, _ in sent.alerts] == titles and str(error) in sent.alerts[0][1]
    assert sent.finished == [1]


def test_temporary_folders_lie_in_the_run_directory_and_the_next_start_clears_them(tmp_path: Path):
    elsewhere = tmp_path / "not mine"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    before = tempfile.gettempdir()
    with scratch.inside(tmp_path):
        left = Path(tempfile.mkdtemp("wandb-media"))
    assert tempfile.gettempdir() == before and tmp_path / scratch.FOLDER == left.parent
    (left.parent / "link").symlink_to(elsewhere)
    with scratch.inside(tmp_path):
        assert list(left.parent.iterdir()) == []
    left.parent.rmdir()
    left.parent.symlink_to(elsewhere)
    with scratch.inside(tmp_path):
        assert not left.parent.is_symlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "wandb").symlink_to(tmp_path / "wandb")
    with pytest.raises(OSError), scratch.inside(tmp_path / "other"):
        pytest.fail("went behind a link")
    assert (elsewhere / "file").exists()
