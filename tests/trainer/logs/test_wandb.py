"""W&B gets every metric, keeps its id, shows no secret, and never stops or holds up a run."""

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
import wandb

from models.analysis.attention_maps import AttentionMap
from models.span import Span
from tests.support import wandb_file
from tests.support.wandb_server import Server
from trainer.config.compose import compose
from trainer.logs import wandb as ours
from trainer.logs.console import Console
from trainer.logs.jsonl import MetricsRow
from trainer.logs.labels import Labels
from trainer.logs.plots import plots
from trainer.logs.run_logger import RunLogger

KEY = "0123456789" * 4


def row(step: int) -> MetricsRow:
    return MetricsRow(
        step, 3.0 / step, 64 * step, 1000.0, 0.5, 1.25, 1e-3, 10**9, None if step == 2 else 0.25
    )


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """A user without W&B settings, and a service process that ends with the test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    wandb.teardown()


def begin(directory: Path, said: list, **settings) -> ours.WandbLogger:
    settings = {"mode": "auto", "labels": Labels("longspan", "r"), "config": {}} | settings
    return ours.WandbLogger(directory, say=said.append, **settings)


def offline(directory: Path) -> list[Path]:
    """The files of offline runs, after W&B's own process has written all of them."""
    wandb.teardown()
    return sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))


def test_an_offline_file_holds_every_metric_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["trainer", "data.hf_token=s3cret", "launch.setup=[export HF_TOKEN=s3cret]"]
    )
    said, config = (
        [],
        {"data": {"tokenizer": "bytes", "hf_token": "s3cret", "path": "https://me:s3cret@host/x"}},
    )
    labels = {"group": "a sweep", "tags": ["model=full", "seed=1"], "name": "model=full seed=1"}
    labels |= {"project": "longspan", "entity": "team", "notes": "why"}
    shown = Labels(**labels | {"tags": tuple(labels["tags"])})
    run = begin(tmp_path, said, config=config | {"batch_tokens": 64}, labels=shown)
    for step in (1, 2, 3):
        run.step(row(step))
    run.step(
        row(4)._replace(
            auxiliary={"balance": 0.1}, statistics={"load": 1.5, "blocks.1.feedforward/load": 1.5}
        )
    )
    bars = [
        {"begin": 0, "end": 1, "loss": 4.0, "tokens": 3},
        {"begin": 1, "end": 2, "loss": None, "tokens": 0},
    ]
    run.evaluation(4, "held_out", 2.75, by_position=bars[:1])
    run.evaluation(4, "held_out", 2.5, by_position=bars)
    run.alert("mine: step skipped", "step 4 was skipped")
    place = run.place
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0, "tokens": 64}\n')
    (tmp_path / "step_4").mkdir()
    (tmp_path / "step_4" / "weights").write_text("of step 4")
    run.finish({"best_loss": 1.0}, plots(tmp_path), checkpoint=tmp_path / "step_4")
    [path] = offline(tmp_path)
    found = wandb_file.read(path)
    assert found.labels == labels
    assert found.alerts == {"mine: step skipped": "step 4 was skipped"}
    assert found.artifacts[f"checkpoint-{run.identity}"] == ["weights"]
    assert said == [] and place == str(path.parent)
    history = {step: {} for step in (1, 2, 3, 4)}
    for part in found.history:
        history.setdefault(part.get("step", 0), {}).update(part)
    for step in (1, 2, 3):
        for name, value in row(step)._asdict().items():
            assert history[step].get(name) == value, (step, name)
        assert history[step]["_step"] == step
        assert history[step]["by_tokens/loss"] == 3.0 / step
    assert history[4]["evaluation/held_out"] == 2.5 and history[4]["auxiliary/balance"] == 0.1
    assert (
        history[4]["statistics/load"] == history[4]["statistics/blocks.1.feedforward/load"] == 1.5
    )
    table = next(
        part[key]
        for part in found.history
        for key in part
        if key == "report/held_out_by_position.path"
    )
    told = json.loads((path.parent / "files" / table).read_text())
    assert told == {
        "columns": ["begin", "end", "loss", "tokens"],
        "data": [[0, 1, 4.0, 3], [1, 2, None, 0]],
    }
    assert found.summary["best_loss"] == 1.0
    assert (
        found.axes["*"] == "step"
        and found.axes["by_tokens/*"] == found.axes["evaluation/*"] == "tokens"
    )
    assert list(path.parent.glob("files/media/images/report/loss*.png"))
    assert found.config["data"] == {
        "tokenizer": "bytes",
        "hf_token": "***",
        "path": "https://***@host/x",
    }
    assert found.config["batch_tokens"] == 64
    written = [file for file in path.parent.rglob("*") if file.is_file()]
    assert path in written and not any(b"s3cret" in file.read_bytes() for file in written)


def test_an_offline_run_holds_loss_by_position_attention_and_grades_as_tables_pictures_and_curves(
    tmp_path,
):
    wish = compose(["name=mine", "wandb.mode=offline", "data=recall"]).config
    assert wish is not None
    log = RunLogger(tmp_path, wish, Console(2, speaks=False), writes=True)
    log.open(0, None)
    bars = [{"begin": 0, "end": 1, "loss": 4.0, "tokens": 3}]
    for step, accuracy in ((1, 0.125), (2, 0.75)):
        log.step(row(step))
        log.evaluation(step, "held_out_loss", 2.0 / step, tokens=3, by_position=bars)
        log.evaluation(step, "accuracy", accuracy)
    log.maps(
        2,
        [
            AttentionMap(
                "blocks.0.mixer.mix", torch.eye(3)[None], 1, Span.line(1, 3), Span.line(1, 3)
            )
        ],
        0,
    )
    log.close(2, 128, {"held_out_loss": 1.0})
    [path] = offline(tmp_path)
    found = wandb_file.read(path)
    curve = {
        part["tokens"]: part["evaluation/accuracy"]
        for part in found.history
        if "evaluation/accuracy" in part
    }
    assert curve == {64: 0.125, 128: 0.75} and found.axes["evaluation/*"] == "tokens"
    assert found.summary["held_out_accuracy"] == 0.75 and found.summary["best_held_out_loss"] == 1.0
    media = {
        key: value for part in found.history for key, value in part.items() if key.endswith(".path")
    }
    names = ("loss", "loss_by_position", "grades", "attention")
    for name in names:
        image = path.parent / "files" / media.pop(f"report/{name}.path")
        assert image.read_bytes() == (tmp_path / "report" / f"{name}.png").read_bytes()
    tables = {
        key: json.loads((path.parent / "files" / value).read_text()) for key, value in media.items()
    }
    assert tables == {
        "report/held_out_loss_by_position.path": {
            "columns": ["begin", "end", "loss", "tokens"],
            "data": [[0, 1, 4.0, 3]],
        },
        "report/held_out_grades.path": {
            "columns": ["step", "accuracy"],
            "data": [[1, 0.125], [2, 0.75]],
        },
    }


def test_an_id_that_was_asked_for_counts_before_the_directorys_and_the_variables_after_it(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-variable")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    first = begin(
        tmp_path / "run", [], labels=Labels("longspan", "r", folder=tmp_path / "elsewhere")
    )
    first.finish({})
    assert first.identity == ours.identity_of(tmp_path / "run") == "of-the-variable"
    monkeypatch.setenv("WANDB_RUN_ID", "of-another-run")
    again = begin(
        tmp_path / "run", [], labels=Labels("longspan", "r", folder=tmp_path / "elsewhere")
    )
    again.finish({})
    asked = begin(
        tmp_path / "run",
        [],
        labels=Labels("longspan", "r", identity="mine"),
        identity="of-a-checkpoint",
    )
    asked.finish({})
    assert (again.identity, asked.identity) == ("of-the-variable", "mine")
    assert len(offline(tmp_path / "elsewhere")) >= 1 and len(offline(tmp_path / "run")) == 1


def test_a_resumed_run_keeps_its_id(tmp_path):
    first = begin(tmp_path, [])
    first.step(row(1))
    first.finish({})
    time.sleep(1.1)  # W&B names directories by the second
    second = begin(tmp_path, [])
    second.finish({})
    elsewhere = begin(tmp_path / "moved", [], identity=first.identity)
    elsewhere.finish({})
    assert first.identity == second.identity == elsewhere.identity == ours.identity_of(tmp_path)
    assert {wandb_file.read(path).identity for path in offline(tmp_path)} == {first.identity}
    assert len(offline(tmp_path)) == 2


def silent_server() -> tuple[socket.socket, str]:
    """A server that takes connections and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    return server, f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_with_a_key_and_no_network_the_run_goes_on_offline_soon_and_says_so_once(
    tmp_path, monkeypatch, mode
):
    server, address = silent_server()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    said, begun = [], time.monotonic()
    run = begin(tmp_path, said, mode=mode, init_timeout_s=2.0)
    run.step(row(1))
    run.finish({})
    assert time.monotonic() - begun < 45
    assert len(said) == 1 and "cannot be reached" in said[0] and "offline" in said[0]
    assert wandb_file.read(offline(tmp_path)[0]).history[0]["loss"] == 3.0
    server.close()


def test_a_server_that_answers_nonsense_is_left_after_the_timeout(tmp_path, monkeypatch):
    server, address = silent_server()

    def nonsense() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connection.recv(1000)
            connection.sendall(
                b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
            connection.close()

    threading.Thread(target=nonsense, daemon=True).start()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    said, begun = [], time.monotonic()
    run = begin(tmp_path, said, init_timeout_s=1.0)
    run.step(row(1))
    run.finish({})
    server.close()
    assert time.monotonic() - begun < 45
    assert len(said) == 1 and "did not answer" in said[0]
    assert wandb_file.read(offline(tmp_path)[0]).history[0]["loss"] == 3.0


def served(path, monkeypatch, said):
    """(server, a run that is online)."""
    server = Server()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server.address)
    run = begin(path, said, mode="online", init_timeout_s=60.0)
    assert not said and "UpsertBucket" in server.asked
    return server, run


def online(directory):
    return sorted((directory / "wandb").glob("run-*/*.wandb"))


def test_with_a_key_and_a_server_the_run_is_online(tmp_path, monkeypatch):
    said = []
    server, run = served(tmp_path, monkeypatch, said)
    for step in range(1, 4):
        run.step(row(step))
    run.finish({"best_loss": 3.0})
    server.close()
    assert not said and not offline(tmp_path)
    assert [each["loss"] for each in server.history if "loss" in each] == [3.0, 1.5, 1.0]


def test_a_run_of_an_agent_has_the_name_that_the_agent_gave_it(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-sweep-1")
    said = []
    server, run = served(tmp_path, monkeypatch, said)
    run.finish({})
    server.close()
    assert run.identity == ours.identity_of(tmp_path) == "of-the-sweep-1" and not said


def test_a_server_that_goes_in_the_middle_holds_up_nothing_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "FINISH_S", 3.0)
    said = []
    server, run = served(tmp_path, monkeypatch, said)
    run.step(row(1))
    server.close()
    begun = time.monotonic()
    for step in range(2, 5):
        run.step(row(step))
    assert time.monotonic() - begun < 2
    run.finish({"best_loss": 3.0})
    assert time.monotonic() - begun < 20
    assert len(said) == 1 and "slow or gone" in said[0] and "`wandb sync`" in said[0]
    kept = []
    while (
        len(kept) < 4 and time.monotonic() - begun < 60
    ):  # W&B's own process writes the file, and is not waited for
        kept = [
            each["step"] for each in wandb_file.read(online(tmp_path)[0]).history if "loss" in each
        ]
    assert kept == [1, 2, 3, 4]


def test_online_without_a_key_is_offline_and_says_so(tmp_path):
    said = []
    begin(tmp_path, said, mode="online").finish({})
    assert len(said) == 1 and "no key" in said[0]
    assert offline(tmp_path)


def test_a_key_in_the_netrc_file_counts(tmp_path, monkeypatch):
    server, address = silent_server()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text(f"machine {address[7:]} login user password {KEY}\n")
    (tmp_path / "home" / ".netrc").chmod(0o600)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    said = []
    begin(tmp_path, said, mode="auto", init_timeout_s=0.5).finish({})
    assert len(said) == 1 and "cannot be reached" in said[0]
    server.close()


def test_an_error_of_wandb_switches_it_off_and_is_said_once(tmp_path, monkeypatch):
    said = []
    run = begin(tmp_path, said)

    def fail(*args, **settings):
        raise RuntimeError("the pipe is gone\nwith a long story")

    monkeypatch.setattr(run.run, "log", fail)
    for step in (1, 2):
        run.step(row(step))
    run.evaluation(2, "held_out", 1.0)
    run.finish({"best_loss": 1.0})
    assert said == [
        "W&B: switched off for the rest of this run (the pipe is gone); metrics.jsonl has"
        " everything"
    ]
    assert run.place is None


def test_a_directory_that_cannot_be_written_switches_it_off(tmp_path):
    (tmp_path / "wandb").write_text("in the way")
    said = []
    run = begin(tmp_path, said)
    run.step(row(1))
    assert len(said) == 1 and "switched off" in said[0]
