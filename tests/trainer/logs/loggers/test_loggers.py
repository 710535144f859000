"""Every logger gets the figures of metrics.jsonl, once each, also after a kill and a resume; none
ends or holds up a run."""

import csv
import io
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.logs.console import Console
from trainer.logs.jsonl import METRICS, MetricsRow, read
from trainer.logs.loggers import guarded
from trainer.logs.loggers.base import Logger, RunStart, flat, numbers
from trainer.logs.run_logger import RunLogger
from trainer.preflight.check_loggers import check_loggers

HERE = "tests.trainer.logs.loggers.test_loggers"


class Broken(Logger):
    """Fails at the second row."""

    def open(self, run: RunStart) -> None:
        self.rows = 0

    def step(self, row: MetricsRow) -> None:
        self.rows += 1
        if self.rows == 2:
            raise RuntimeError("no more of that, token=s3cret")

    def evaluation(self, step: int, name: str, value: float, made_of: Any) -> None:
        raise AssertionError("called after an error")


class Stuck(Broken):
    """Never comes back from its first row."""

    def step(self, row: MetricsRow) -> None:
        time.sleep(60)


def config(*words: str) -> Config:
    found = compose(["name=mine", *words])
    assert found.config is not None and not found.faults, found.faults
    return found.config


def row(step: int) -> MetricsRow:
    return MetricsRow(step, 3.0 / step, 64 * step, 1000.0, 0.5, 1.25, 1e-3, 10**9, None)


def opened(directory: Path, wish: Config, step: int) -> tuple[RunLogger, io.StringIO]:
    screen = io.StringIO()
    log = RunLogger(directory, wish, Console(9, file=screen), writes=True)
    log.open(step, None)
    return log, screen


def killed_and_resumed(directory: Path, wish: Config) -> None:
    """Steps 1 to 4, a kill that leaves no time to close, and steps 3 to 5 from step 2 on."""
    first, _ = opened(directory, wish, 0)
    for step in (1, 2):
        first.step(row(step))
    first.evaluation(2, "held_out_loss", 2.5, tokens=9)
    for step in (3, 4):
        first.step(row(step))
    first.evaluation(4, "held_out_loss", 9.0, tokens=9)
    # What waits is written, as it would have been some time before the kill.
    for logger in first.loggers.values():
        logger.waiting.put(None)
        assert logger.thread is not None
        logger.thread.join()
    second, screen = opened(directory, wish, 2)
    second.step(row(3))
    second.step(row(4)._replace(auxiliary={"balance": 0.5}))
    second.evaluation(4, "held_out_loss", 2.0, tokens=9)
    second.step(row(5))
    second.close(5, 320, {})
    assert "switched off" not in screen.getvalue(), screen.getvalue()


def recorded(directory: Path) -> dict[tuple[str, int], float]:
    """The figures of metrics.jsonl by (name, step)."""
    figures = {}
    for record in read(directory / METRICS):
        whole = MetricsRow(**{name: record.get(name) for name in MetricsRow._fields})
        for name, value in numbers(flat(whole)).items():
            figures[name, record["step"]] = value
    return figures


def test_csv_has_every_row_once_and_columns_that_come_later(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, config("logger=csv"))
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(each["step"]) for each in rows] == [1, 2, 3, 4, 5]
    found = {
        (name, int(each["step"])): float(value)
        for each in rows
        for name, value in each.items()
        if value
    }
    assert found == recorded(tmp_path) and found["auxiliary/balance", 4] == 0.5
    with open(tmp_path / "evaluation.csv", newline="") as file:
        values = [(int(each["step"]), float(each["value"])) for each in csv.DictReader(file)]
    assert values == [(2, 2.5), (4, 2.0)]


def test_tensorboard_has_every_row_once(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, config("logger=tensorboard"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        for point in events.Scalars(name):
            assert (name, point.step) not in found
            found[name, point.step] = point.value
    assert found.pop(("evaluation/held_out_loss", 2)) == 2.5
    assert found.pop(("evaluation/held_out_loss", 4)) == 2.0
    wanted = {key: value for key, value in recorded(tmp_path).items() if key[0] != "step"}
    assert found == pytest.approx(wanted, rel=1e-6)
    assert "report/loss" in events.Tags()["images"]


def test_mlflow_has_every_row_once_and_the_settings(tmp_path: Path) -> None:
    tracking: Any = import_module("mlflow")
    wish = config("logger=mlflow", "logger.mlflow.experiment=mine")
    killed_and_resumed(tmp_path, wish)
    uri = (tmp_path / "mlflow").as_uri()
    client = tracking.MlflowClient(uri)
    [run] = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["optim.learning_rate"]
    found = {}
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            assert (name, point.step) not in found
            found[name, point.step] = point.value
    assert found.pop(("evaluation/held_out_loss", 2)) == 2.5
    # MLflow cannot take back what the killed run sent of step 4.
    assert found.pop(("evaluation/held_out_loss", 4)) == 9.0
    wanted = recorded(tmp_path)
    del wanted["auxiliary/balance", 4]
    assert found == wanted


def test_mlflow_takes_figures_below_figures_and_any_name(tmp_path: Path) -> None:
    tracking: Any = import_module("mlflow")
    log, said = opened(tmp_path, config("logger=mlflow"), 0)
    names = ("refusal", "refusal/over_refusal", "refusal/over_refusal/image", "loss (far)")
    for name in names:
        log.evaluation(1, name, 0.5)
    log.close(1, 1, {})
    assert "switched off" not in said.getvalue()
    client = tracking.MlflowClient((tmp_path / "mlflow").as_uri())
    [run] = client.search_runs([client.get_experiment_by_name("longspan").experiment_id])
    assert sorted(run.data.metrics) == [
        "evaluation/loss _far_",
        "evaluation/refusal",
        "evaluation/refusal.over_refusal",
        "evaluation/refusal.over_refusal.image",
    ]


def test_values_that_come_again_replace_the_old(tmp_path: Path) -> None:
    wish = config("logger=[csv,tensorboard]")
    first, _ = opened(tmp_path, wish, 0)
    first.evaluation(2, "held_out_loss", 9.0)
    first.evaluation(2, "needle/accuracy", 0.5, part="needle")
    first.close(2, 1, {})
    second, _ = opened(tmp_path, wish, 2)
    second.drop_evaluation(2, ["held_out"])
    second.evaluation(2, "held_out_loss", 2.0)
    second.close(2, 1, {})
    with open(tmp_path / "evaluation.csv", newline="") as file:
        values = {each["name"]: float(each["value"]) for each in csv.DictReader(file)}
    assert values == {"needle/accuracy": 0.5, "held_out_loss": 2.0}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name, value in values.items():
        assert [point.value for point in events.Scalars(f"evaluation/{name}")] == [value]


def test_a_logger_that_fails_is_said_once_and_the_others_go_on(tmp_path: Path) -> None:
    wish = config("logger=csv", f"logger.mine._target_={HERE}.Broken")
    assert list(check_loggers(wish)) == []
    log, screen = opened(tmp_path, wish, 0)
    for step in range(1, 5):
        log.step(row(step))
    log.evaluation(4, "held_out_loss", 2.0)
    log.close(4, 1, {})
    [line] = [line for line in screen.getvalue().splitlines() if "switched off" in line]
    assert line.startswith("mine: switched off") and "RuntimeError" in line
    assert "s3cret" not in line
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 5
    assert [name for name, _ in log.places()] == ["csv"]


def test_a_logger_that_hangs_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "FINISH_S", 0.3)
    log, screen = opened(tmp_path, config("logger=[]", f"logger.mine._target_={HERE}.Stuck"), 0)
    begun = time.monotonic()
    for step in range(1, 5):
        log.step(row(step))
    assert time.monotonic() - begun < 0.2
    log.close(4, 1, {})
    assert "mine: not done within 0.3 s" in screen.getvalue()


def test_a_run_that_fails_says_so_in_mlflow(tmp_path: Path) -> None:
    tracking: Any = import_module("mlflow")
    log, _ = opened(tmp_path, config("logger=mlflow"), 0)
    with pytest.raises(RuntimeError), log.alerting():
        raise RuntimeError("x")
    client = tracking.MlflowClient((tmp_path / "mlflow").as_uri())
    [run] = client.search_runs([client.get_experiment_by_name("longspan").experiment_id])
    assert run.info.status == "FAILED"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["logger=tensorbord"], "there is no logger of that name; did you mean logger=tensorboard"),
        (["logger=null"], "known: csv, mlflow, tensorboard, wandb; [] is none"),
        (["logger.csv.separator=;"], "no logger csv is chosen; write logger=[wandb,csv] as well"),
        (["logger.mine._target_=torch.nn.Identity"], "it is no logger"),
        (["logger=csv", "logger.csv.separator=abc"], "logger.csv: separator='abc': one character"),
        (["logger=csv", "logger.csv.seperator=x"], "did you mean logger.csv.separator?"),
    ],
)
def test_a_bad_logger_is_one_message(words: list[str], said: str) -> None:
    composed = compose(words)
    faults = list(composed.faults)
    if composed.config is not None and not faults:
        faults = [str(fault) for fault in check_loggers(composed.config)]
    assert len(faults) == 1 and said in faults[0], faults


def test_a_package_that_is_missing_is_said_with_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    [fault] = check_loggers(config("logger=[csv,tensorboard]"))
    assert not isinstance(fault, str)
    assert (fault.key, fault.value) == ("logger", "tensorboard")
    assert "not installed" in fault.fact and fault.remedy == "pip install tensorboard"
