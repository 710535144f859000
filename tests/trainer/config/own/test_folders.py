"""The user's own yaml files are found, chosen and listed in messages, in every command."""

import os
import re

import pytest

from longspan.completion import candidates
from scripts import wandb_sweep
from trainer.config import groups
from trainer.config.compose import compose
from trainer.config.help import text
from trainer.config.own.folders import own_words, searching
from trainer.errors import UserError
from trainer.launch.slurm import script

GLOBAL = "# @package _global_\n"


@pytest.fixture
def folder(tmp_path):
    files = {
        "mixer/narrow.yaml": "_target_: models.attention.sliding.Sliding\nwindow: 8  # my window\n",
        "experiment/mine.yaml": f"{GLOBAL}defaults:\n  - override /mixer: narrow\nsteps: 7\n",
        "task/short.yaml": f"{GLOBAL}context_length: 64\nbatch_tokens: 128\n",
        "recipes/deep/wide.yaml": f"{GLOBAL}model: {{width: 256}}\n",
    }
    for name, content in files.items():
        path = tmp_path / "my conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "my conf"


@pytest.mark.parametrize(
    "way",
    [
        ["--config-dir={0}"],
        ["--config-dir", "{0}"],
        ["-cd", "{0}"],
        ["hydra.searchpath=[file://{0}]"],
        ["hydra.searchpath=['{0}']"],
    ],
)
def test_every_way_to_name_a_folder(folder, way):
    words = [word.format(folder) for word in way]
    with searching([*words, "experiment=mine", "task=short", "mixer.window=9"]) as settings:
        found = compose(settings)
        assert own_words() == [f"--config-dir={folder}"]
    assert not found.faults, found.faults
    config = found.config
    assert (config.steps, config.context_length, config.batch_tokens) == (7, 64, 128)
    assert config.mixer.settings() == {"window": 9}
    assert groups.OWN_FOLDERS not in os.environ


def test_a_folder_beside_the_present_one_and_a_package(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "mypackage").mkdir()
    (folder.parent / "mypackage" / "__init__.py").touch()
    monkeypatch.syspath_prepend(folder.parent)
    for way in ("--config-dir=my conf", "hydra.searchpath=[pkg://mypackage]"):
        with searching([way]):
            assert groups.own_folders()[0].parent == folder.parent
            assert groups.own_folders()[0].is_absolute()


def test_a_group_below_another_is_chosen_by_its_path(folder):
    with searching([f"--config-dir={folder}"]):
        found = compose(["recipes/deep=wide"])
        assert not found.faults, found.faults
        assert found.config.model.width == 256


def test_messages_and_help_and_completion_list_them(folder):
    with searching([f"--config-dir={folder}"]):
        assert "narrow" in compose(["mixer=narow"]).faults[0]
        (fault,) = compose(["task=nothing"]).faults
        assert fault == "task=nothing: there is no task of that name; known: short"
        assert "my window" in text(["mixer=narrow", "--help"])
        assert "task=               short" in text([])
        assert candidates("mixer=nar") == ["mixer=narrow"]
        assert candidates("tas") == ["task="]
    assert "narrow" not in compose(["mixer=narow"]).faults[0]


def test_what_starts_the_command_again_names_the_folder(folder, tmp_path):
    with searching([f"--config-dir={folder}"]):
        plan = wandb_sweep.plan(["mixer=full,narrow"])
        config = compose(["launch=slurm", "mixer=narrow"]).config
        written = script(config, tmp_path, ["mixer=narrow"])
    assert f"--config-dir={folder}" in plan["command"]
    assert f"'--config-dir={folder}'" in written


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mixer/full.yaml", "", r"full.yaml: Longspan has a mixer/full; name it otherwise"),
        ("train.yaml", "", r"train.yaml: Longspan has a train; name it otherwise"),
        ("engine/mine.yaml", "", r"mine.yaml: a file cannot add to engine; use engine.KEY=VALUE"),
        ("task/mine.yaml", "steps: 3", r"no group task, .* begin it with # @package _global_"),
    ],
)
def test_a_file_that_cannot_be_chosen_is_one_message(tmp_path, name, content, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        searching([f"--config-dir={tmp_path}"]).__enter__()
    assert len(str(error.value).splitlines()) == 1
    assert groups.OWN_FOLDERS not in os.environ


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-dir=/no/such"], "--config-dir=/no/such: there is no such folder; name one"),
        (["--config-dir"], "--config-dir: it needs a folder; write --config-dir=FOLDER"),
        (["hydra.searchpath=[pkg://no.such]"], "there is no package no.such; write file://FOLDER"),
        (["hydra.searchpath=[s3://bucket]"], "an entry begins with file:// or pkg://"),
    ],
)
def test_a_folder_that_is_not_there_is_one_message(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        searching(words).__enter__()


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "mixer").mkdir()
    (tmp_path / "mixer" / "mine.yaml").write_text("a: [1\n")
    with searching([f"--config-dir={tmp_path}"]):
        found = compose([])
    assert found.config is None
    assert str(tmp_path / "mixer" / "mine.yaml") in found.faults[0]
    assert len(found.faults) == 1
