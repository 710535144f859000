"""A class that cannot be imported is one message, wherever a config names it."""

import sys

import pytest

from trainer.errors import UserError
from trainer.files.import_by_name import import_module_of
from trainer.preflight.check import check_config
from trainer.preflight.prepare import load_config

NAMES = ["../..", "..a.B", ".B", "a.", "B", "a b.C", "models..B", "models.nowhere.B"]
PLACES = ["model", "mixer", "position", "memory", "cache", "data", "objective", "optim", "schedule"]
MORE = ["engine", "evaluation.heldout", "model.feedforward"]
FAULTY = {
    "raises": "raise RuntimeError('not today')",
    "ends": "import sys; sys.exit('gone')",
    "broken": "def f(:",
    "looks_elsewhere": "import no_such_package_here",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", [*PLACES, *MORE])
def test_a_name_of_nothing_is_refused(place, name):
    with pytest.raises(UserError) as caught:
        check_config(load_config([f"{place}._target_={name}"]))
    assert f"{place}._target_={name}" in str(caught.value)


@pytest.mark.parametrize("code", FAULTY)
def test_a_module_that_fails_says_why(code, tmp_path, monkeypatch):
    module = f"faulty_{code}"
    (tmp_path / f"{module}.py").write_text(FAULTY[code])
    monkeypatch.syspath_prepend(tmp_path)
    for place in (*PLACES, *MORE):
        with pytest.raises(UserError) as caught:
            check_config(load_config([f"{place}._target_={module}.Part"]))
        reason = {
            "raises": "RuntimeError: not today",
            "ends": "SystemExit: gone",
            "broken": "SyntaxError",
            "looks_elsewhere": "no_such_package_here",
        }[code]
        assert reason in str(caught.value), place
    assert module not in sys.modules


def test_a_dotted_name_gives_the_module_and_the_last_word():
    module, name = import_module_of("trainer.errors.UserError")
    assert getattr(module, name) is UserError
