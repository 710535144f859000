"""The config is typed, frozen, and survives its own file."""

import pytest
from pydantic import ValidationError

from trainer import run_dir
from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.errors import BAD_CONFIG, BAD_RUN, UserError


def config(*words: str) -> Config:
    asked = compose(words)
    assert asked.config is not None
    assert not asked.faults
    return asked.config


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        config().steps = 3  # pyright: ignore


def test_a_node_keeps_the_settings_that_belong_to_its_class() -> None:
    mixer = config("mixer=sliding", "mixer.window=9").mixer
    assert mixer is not None
    assert (mixer.target, mixer.settings()) == ("models.attention.sliding.Sliding", {"window": 9})


def test_rows_and_ranks_follow_from_the_sizes() -> None:
    made = config("context_length=32", "batch_tokens=256", "parallel.context=3", "parallel.data=2")
    assert (made.rows, made.parallel.ranks) == (8, 6)


def test_a_whole_float_is_a_whole_number_and_a_number_is_a_name() -> None:
    made = config("steps=1e3", "name=2024")
    assert (made.steps, made.name) == (1000, "2024")


def test_a_config_read_back_from_its_file_is_the_same(tmp_path) -> None:
    made = config(
        "mixer=sliding", "parallel.context=2", "optim.eps=1e-9", "evaluation.prompt='a: b'"
    )
    run_dir.record(tmp_path, made)
    assert run_dir.read_config(tmp_path) == made


def test_an_experiment_is_overridden_by_the_command_line() -> None:
    assert config("experiment=quickstart").name == "quickstart"
    assert config("experiment=quickstart", "name=mine", "steps=3").steps == 3


def test_a_fault_carries_its_exit_status() -> None:
    assert (UserError("x").code, UserError("x", BAD_RUN).code, BAD_CONFIG) == (2, 3, 2)
