"""A class that cannot be imported is one message, wherever a config names it."""

import importlib
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nosuch.layers", None, r"there is no module nosuch.layers; looked for in .*{home}.*start"),
        (
            "ownpackage.nosuch",
            None,
            r"no module nosuch in {home}/ownpackage; name a class",
        ),
        ("ownmodule.inner", None, r"ownmodule is a module and no package, so there is"),
        ("ownfault", "import json\nx = (\n", r"SyntaxError: .*ownfault.py, line 2\)"),
        ("ownfault", "\nimport notthere\n", r"FoundError: .*notthere.*ownfault.py, line 2\)"),
        ("ownfault", "def f():\n    1 / 0\nf()\n", r"DivisionError: .*ownfault.py, line 2\)"),
        ("ownfault", "import sys\nsys.exit(3)\n", r"raised SystemExit: 3 .*line 2\); mend that"),
    ],
)
def test_a_module_says_why_it_cannot_be_imported_and_where(
    name, content, message, tmp_path, monkeypatch
):
    (tmp_path / "ownpackage").mkdir()
    (tmp_path / "ownpackage" / "__init__.py").touch()
    (tmp_path / "ownmodule.py").touch()
    if content is not None:
        (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    try:
        with pytest.raises(ImportError, match=message.format(home=tmp_path)) as error:
            import_module_of(f"{name}.Part")
        assert len(str(error.value).splitlines()) == 1
    finally:
        for module in ("ownpackage", "ownmodule"):
            sys.modules.pop(module, None)
