"""The source of a user's own parts lies beside the run, and a resume with other source says so."""

import importlib
import json
import sys

import pytest

from trainer.config.own.source import newest_source, own_source, save_source, source_hashes
from trainer.preflight import prepare

TREE = {"mixer": {"_target_": "ownparts.layers.Layer"}, "optim": {"_target_": "torch.optim.SGD"}}
FILES = {
    "ownparts/__init__.py": "",
    "ownparts/layers.py": "import torch\nfrom . import shared\nfrom ownhelp import f\n",
    "ownparts/shared.py": "import json\n",
    "ownparts/unused.py": "",
    "ownhelp.py": "def f(): pass\n",
}
USED = ["ownhelp.py", "ownparts/__init__.py", "ownparts/layers.py", "ownparts/shared.py"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name, content in FILES.items():
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.syspath_prepend(tmp_path / "home")
    (tmp_path / "run").mkdir()
    importlib.import_module("ownparts.layers")
    yield tmp_path / "home"
    for name in [name for name in sys.modules if name.startswith(("ownparts", "ownhelp"))]:
        del sys.modules[name]


def test_what_a_config_leads_to_is_found_and_nothing_else(home):
    found = own_source(TREE)
    assert list(found) == USED
    assert found["ownparts/shared.py"] == home / "ownparts" / "shared.py"
    assert own_source({"mixer": {"_target_": "models.attention.full.Attention"}}) == {}


def test_copies_are_kept_and_a_change_is_said_once(home, tmp_path):
    run = tmp_path / "run"
    assert save_source(run, TREE) == ""
    assert save_source(run, TREE) == ""
    assert [path.name for path in (run / "source").iterdir()] == ["1"]
    assert (run / "source/1/ownparts/layers.py").read_text() == FILES["ownparts/layers.py"]
    hashes = json.loads((run / "source/1/sha256.json").read_text())
    assert list(hashes) == USED
    assert hashes == source_hashes(TREE)
    (home / "ownparts" / "shared.py").write_text("import json, re\n")
    remark = save_source(run, TREE)
    before, after = hashes["ownparts/shared.py"][:8], source_hashes(TREE)["ownparts/shared.py"][:8]
    assert remark.startswith(f"source: ownparts/shared.py ({before} to {after}) changed since")
    assert f"the former is in {run / 'source' / '1'}" in remark
    assert newest_source(run) == (2, source_hashes(TREE))
    assert save_source(run, TREE) == ""


def test_a_copy_that_was_cut_short_counts_for_none(home, tmp_path):
    run = tmp_path / "run"
    save_source(run, TREE)
    (run / "source/1/sha256.json").unlink()
    assert newest_source(run) == (1, None)
    assert save_source(run, TREE) == ""
    assert newest_source(run) == (2, source_hashes(TREE))


def test_the_remark_reaches_the_user_and_the_record(home, tmp_path, capsys):
    run = tmp_path / "run"
    config = prepare.load_config(["data=copy", "model.width=16", "model.layers=1"])
    # An own class that needs no check of its own.
    own = config.model_copy(
        update={"schedule": config.schedule.model_copy(update={"target": "ownparts.layers.S"})}
    )
    prepare.write_record(own, run)
    (home / "ownhelp.py").write_text("def f(): return 1\n")
    prepare.write_record(own, run)
    said = capsys.readouterr().err
    assert said.count("source: ownhelp.py") == 1
    assert len(said.splitlines()) == 1
