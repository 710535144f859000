"""`run_dir=PATH` alone goes on with the config that lies there."""

import pytest
import yaml

from trainer.errors import UserError
from trainer.preflight.prepare import load_config
from trainer.run_dir import CONFIG, plain_config, record

WORDS = (
    "mixer=sliding",
    "mixer.window=7",
    "model.width=32",
    "model.layers=1",
    "context_length=64",
    "batch_tokens=128",
    "steps=9",
)


def recorded(folder, *words):
    config = load_config([*WORDS, *words, f"run_dir={folder}"])
    folder.mkdir()
    record(folder, config)
    return config


def test_the_directory_alone_is_enough(tmp_path):
    first = recorded(tmp_path / "run", "match=parameters", "resume=never")
    again = load_config([f"run_dir={tmp_path / 'run'}"])
    assert plain_config(again) == {**plain_config(first), "resume": "auto"}
    assert again.mixer is not None and again.mixer.settings()["window"] == 7


def test_further_settings_are_a_command_of_their_own(tmp_path):
    recorded(tmp_path / "run")
    with pytest.raises(UserError, match="mixer"):
        load_config([f"run_dir={tmp_path / 'run'}", "steps=12"])


def test_a_directory_without_a_run_begins_one(tmp_path):
    assert load_config([f"run_dir={tmp_path / 'new'}"]).steps == 100


def test_a_record_that_names_a_strangers_class_is_refused(tmp_path):
    recorded(tmp_path / "run")
    path = tmp_path / "run" / CONFIG
    path.write_text(path.read_text().replace("models.attention.sliding.Sliding", "mine.Layer"))
    with pytest.raises(UserError, match=r"mine\.Layer is no part of Longspan.*command again"):
        load_config([f"run_dir={tmp_path / 'run'}"])


def test_a_record_that_cannot_be_read_is_said(tmp_path):
    recorded(tmp_path / "run")
    (tmp_path / "run" / CONFIG).write_text("steps: none\n")
    with pytest.raises(UserError, match=r"config.yaml cannot be read .*choose another run_dir"):
        load_config([f"run_dir={tmp_path / 'run'}"])


@pytest.mark.parametrize("key", ["log.on_event", "launch.setup"])
def test_a_record_that_names_a_command_is_refused(tmp_path, key):
    recorded(tmp_path / "run")
    path = tmp_path / "run" / CONFIG
    group, name = key.split(".")
    tree = yaml.safe_load(path.read_text())
    tree[group][name] = "touch x" if key == "log.on_event" else ["touch x"]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=rf"{key}=.*is a command.*command again"):
        load_config([f"run_dir={tmp_path / 'run'}"])
