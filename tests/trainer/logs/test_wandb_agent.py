"""W&B's own sweep agent runs what scripts/wandb_sweep.py wrote, against a server of the tests'
own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scripts.wandb_sweep import plan
from tests.support.wandb_server import Server
from tests.trainer.logs.test_wandb import KEY
from trainer.errors import UserError

SMALL = [
    "steps=2",
    "context_length=64",
    "batch_tokens=128",
    "model.width=16",
    "model.layers=1",
    "model.heads=2",
]
EVALUATED = ["evaluation.every=2", "evaluation.batches=1"]


def test_lists_are_values_ranges_are_distributions_and_the_rest_is_the_command():
    made = plan(["model=full,retnet", "seed=1,2", "steps=9"])
    assert made["method"] == "grid"
    assert made["parameters"] == {
        "model": {"values": ["full", "retnet"]},
        "seed": {"values": [1, 2]},
    }
    assert made["command"][-2:] == ["${args_no_hyphens}", "steps=9"]
    made = plan(["optim.learning_rate=tag(log, interval(0.001, 0.1))", "method=bayes"])
    found = {"distribution": "log_uniform_values", "min": 0.001, "max": 0.1}
    assert made["method"] == "bayes" and made["parameters"] == {"optim.learning_rate": found}
    assert plan(["seed=interval(0, 1)"])["parameters"]["seed"]["distribution"] == "uniform"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["steps=9"], "no setting has several values"),
        (["seed=1,2", "method=luck"], "method=luck: choose grid, random, bayes"),
        (["seed=interval(0, 1)", "method=grid"], "grid needs lists"),
        (["model=full,no_such"], "no_such"),
    ],
)
def test_what_is_no_sweep_is_refused(words, says):
    with pytest.raises(UserError, match=says):
        plan(words)


def wandb(place: Path, server: Server, *words: str) -> str:
    """All that W&B's command said, which ends well."""
    settings = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.address, "HOME": str(place)}
    search = (  # agents start `python`
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    told = subprocess.run(
        [sys.executable, "-m", "wandb", *words],
        cwd=place,
        env={**os.environ, **settings, "PATH": search},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout + told.stderr


@pytest.mark.full
def test_an_agent_runs_every_job_under_the_name_that_the_sweep_gave_it(tmp_path):
    server = Server()
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump(plan(["mixer=full,sliding", *SMALL, *EVALUATED]))
    )
    wandb(tmp_path, server, "sweep", "sweep.yaml")
    server.jobs = [
        {"mixer": mixer} for mixer in yaml.safe_load(server.sweep)["parameters"]["mixer"]["values"]
    ]
    told = wandb(tmp_path, server, "agent", "me/longspan/s")
    server.close()
    assert "W&B: switched off" not in told, told
    names = ["of-the-sweep-1", "of-the-sweep-2"]
    places = sorted((tmp_path / "runs").iterdir())
    assert [(place / "wandb" / "run_id").read_text().strip() for place in places] == names
    mixers = [json.loads(server.runs[name]["config"])["mixer"]["value"] for name in names]
    assert mixers == ["full", "sliding"]
    aim = yaml.safe_load(server.sweep)["metric"]["name"]
    assert len([each for each in server.history if aim in each]) == 2, (
        "a row for each run: what the sweep is judged by"
    )
