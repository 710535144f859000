"""Every key of conf/ is described, and help shows a part or a key with type, range and default."""

import pytest

from trainer.config.groups import CONF
from trainer.config.help import text
from trainer.config.key_help import documented_arguments, keys_of_file, kind_of_annotation
from trainer.config.schema import Config
from trainer.errors import UserError

FILES = [path for path in sorted(CONF.rglob("*.yaml")) if "hydra" not in path.parts]


def test_every_key_of_conf_has_a_description():
    silent = []
    count = 0
    for path in FILES:
        for entry in keys_of_file(path):
            count += 1
            if not entry.meaning:
                silent.append(f"{path.relative_to(CONF)}: {entry.key}")
    assert count > 400
    assert not silent, "\n".join(silent)


def test_every_field_of_the_schema_has_a_description():
    silent = []
    for name, field in Config.model_fields.items():
        groups = hasattr(field.annotation, "model_fields")
        if not field.description and not groups:
            silent.append(name)
    assert silent == [] or set(silent) <= {"position", "data", "optim", "schedule", "engine"}


def test_the_settings_of_a_part_have_meaning_type_range_and_default():
    shown = text(["mixer=sliding", "mixer.window=512", "--help"])
    assert "models.attention.sliding.Sliding" in shown
    (place,) = [i for i, line in enumerate(shown.splitlines()) if "mixer.window (512)" in line]
    line, kind = shown.splitlines()[place : place + 2]
    assert line.endswith("tokens seen, oneself among them")
    assert "whole number" in kind
    assert "evaluation." not in shown


def test_a_key_alone_and_a_group_alone():
    assert "optimiser steps" in text(["--help", "steps"])
    assert "whole number, at least 1, at most 2^36" in text(["--help", "steps"])
    assert "float32, float64, bfloat16" in text(["--help", "precision"])
    members = text(["--help", "mixer"])
    assert "lsh" in members and "Reformer" in members
    shown = text(["--help", "mixer.window", "mixer=sliding"])
    assert shown.startswith("    mixer.window (256)")
    assert "tokens seen, oneself among them" in shown


def test_a_setting_that_the_yaml_leaves_out_is_shown_with_the_default_of_the_class():
    shown = text(["model=full", "--help"])
    assert "model.norm_place (before)" in shown
    assert "before a layer, after its sum with the input" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--help", "optim.learning_rat"], "did you mean optim.learning_rate"),
        (["--help", "stpes"], "stpes: there is no such setting"),
        (["mixer=nothing", "--help"], "there is no mixer of that name"),
    ],
)
def test_what_is_not_there_is_said(words, message):
    with pytest.raises(UserError, match=message):
        text(words)


def test_arguments_of_a_docstring_over_several_lines():
    class Documented:
        """Does something.

        Args:
            first: one line.
            second, third: begins here
                and ends here.
            fourth: last.

        Returns:
            fifth: no argument.
        """

    meanings = documented_arguments(Documented)
    assert meanings["second"] == meanings["third"] == "begins here and ends here."
    assert set(meanings) == {"first", "second", "third", "fourth"}
    assert kind_of_annotation(int | None) == "whole number or null"
