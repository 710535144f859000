"""Nothing that a stranger wrote is run, and no secret of the user's is written down."""

import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.support import forked_python
from tests.test_architecture import ROOT
from tests.trainer.verify.test_killed import words
from trainer import run_dir
from trainer.checkpoint.manifest import MANIFEST
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.writer import CheckpointWriter
from trainer.data.corpus import Corpus, Damaged
from trainer.errors import UserError
from trainer.logs.jsonl import METRICS, Metrics, read
from trainer.preflight import prepare

SECRETS = {
    "WANDB_API_KEY": "0123456789" * 4,
    "HF_TOKEN": "hf_" + "qwertzuiop" * 3,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/" + "x" * 18,
}


@pytest.mark.slow
def test_no_secret_is_in_the_run_directory_or_in_what_a_crash_prints(tmp_path):
    unreachable = {
        "WANDB_BASE_URL": "http://127.0.0.1:9"
    }  # a key, but nobody answers: the run is offline
    command = [
        sys.executable,
        "-m",
        "trainer",
        *words(tmp_path, "run", "engine=single", "evaluation.every=0"),
    ]
    command.remove("model.heads=4")  # the layer that breaks has none
    command += [
        "mixer._target_=tests.support.breaking_data.Breaking",
        "wandb.mode=auto",
        "model.layers=1",
    ]
    done = forked_python.run(
        command, cwd=ROOT, env={**os.environ, **SECRETS, **unreachable, "HOME": str(tmp_path)}
    )
    told = done.stdout + done.stderr
    assert done.returncode == 1 and "RuntimeError: a bug that a user wrote" in told, told
    assert "going on offline" in told, told
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {run_dir.CONFIG, run_dir.ENVIRONMENT, METRICS} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files), "W&B wrote its own files"
    for name, secret in SECRETS.items():
        assert secret not in told, f"{name} is printed"
        assert not [path for path in files if secret.encode() in path.read_bytes()], (
            f"{name} is written"
        )


class Trap:
    """A pickle that makes a directory when it is opened."""

    def __init__(self, sprung: Path):
        self.sprung = sprung

    def __reduce__(self):
        return os.mkdir, (str(self.sprung),)


class Refused(pickle.Unpickler):
    def load(self):
        pytest.fail("something was unpickled")


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """Pickles, as pickle and as torch write them; the test fails when one is opened, or anything
    unpickles at all."""
    sprung = tmp_path / "sprung"
    torch.save(Trap(sprung), tmp_path / "trap.pt")
    pickles = (
        pickle.dumps(Trap(sprung), 0),
        pickle.dumps(Trap(sprung)),
        (tmp_path / "trap.pt").read_bytes(),
    )
    for module, name in (
        (torch, "load"),
        (pickle, "load"),
        (pickle, "loads"),
        (yaml, "unsafe_load"),
    ):
        monkeypatch.setattr(
            module, name, lambda *args, **settings: pytest.fail("something was unpickled")
        )
    monkeypatch.setattr(pickle, "Unpickler", Refused)
    yield pickles
    assert not sprung.exists()


def strangers(tmp_path):
    """A run directory with all that ours hold, and the wish to go on in it."""
    wish = words(tmp_path, "theirs", "engine=single")
    config, path = prepare.create_run_dir(prepare.load_config(wish))
    run_dir.record(path, config)
    checkpoints = CheckpointWriter(path / "checkpoints", say=lambda text: None)
    checkpoints.save(2, {"model": {"w": torch.ones(64)}}, {})
    checkpoints.close()
    (path / METRICS).write_text('{"step": 1, "loss": 3.0, "tokens": 4}\n')
    return wish, path


def test_a_pickle_in_the_place_of_any_file_of_a_run_directory_is_not_opened(tmp_path, trap):
    wish, path = strangers(tmp_path)
    place = path / "checkpoints" / "step_00000002"
    for number, content in enumerate(trap):
        theirs = path.with_name(f"theirs {number}")
        shutil.copytree(path, theirs)
        here = theirs / "checkpoints" / place.name
        for file in (
            METRICS,
            "evaluation.jsonl",
            run_dir.LOCK,
            run_dir.ENVIRONMENT,
            "wandb/run_id",
        ):
            (theirs / file).parent.mkdir(exist_ok=True)
            (theirs / file).write_bytes(content + b"\n")
        with pytest.raises(ValueError, match="no JSON object"):
            list(read(theirs / METRICS))
        with pytest.raises(ValueError, match="no JSON object"):
            Metrics(theirs).truncate_after(0)
        for file in (MANIFEST, "shard_00000.safetensors", ".metadata"):
            (here / file).write_bytes(content)
            if file != ".metadata":
                with pytest.raises(UserError, match="is whole"):
                    CheckpointReader(theirs / "checkpoints", say=lambda text: None).latest()
                shutil.copy(place / file, here / file)
        (theirs / run_dir.CONFIG).write_bytes(content)
        for words_ in (
            [*wish, f"run_dir={str(theirs)!r}"],
            [*wish, f"resume={str(theirs)!r}", f"run_dir={tmp_path / 'mine'}"],
        ):
            with pytest.raises(UserError, match=r"config.yaml cannot be read"):
                prepare.load_config(words_)


@pytest.mark.parametrize("how", ["a tag", "a target"])
def test_a_config_of_a_stranger_makes_nothing(how, tmp_path, trap):
    wish, path = strangers(tmp_path)
    config = yaml.safe_load((path / run_dir.CONFIG).read_text())
    if how == "a tag":
        (path / run_dir.CONFIG).write_text(
            f"name: !!python/object/apply:os.mkdir ['{tmp_path / 'sprung'}']\n"
        )
    else:
        config["schedule"] = {
            "_target_": "subprocess.Popen",
            "args": ["mkdir", str(tmp_path / "sprung")],
        }
        (path / run_dir.CONFIG).write_text(yaml.safe_dump(config))
    with pytest.raises(
        UserError, match="cannot be read" if how == "a tag" else "schedule._target_"
    ):
        prepare.load_config(wish)


def test_a_pickle_in_the_token_cache_is_not_opened(tmp_path, trap):
    folder = tmp_path / "cache" / "files-0123"
    folder.mkdir(parents=True)
    for content in trap:
        for file in ("facts.json", "tokens.arrow"):
            (folder / file).write_bytes(content)
        with pytest.raises(Damaged):
            Corpus(folder)
