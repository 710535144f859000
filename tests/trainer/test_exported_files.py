"""Every adapter: the files that come out against those that went in, byte by byte, key by key."""

import json

import pytest

from models.hub.registry import ADAPTERS
from tests.models.hub.test_adapters import CASES
from tests.models.hub.test_rwkv import theirs_in
from tests.support import hub
from tests.support.hub import SMALL_BERT
from trainer.init_from.huggingface import read_config

MORE = {
    "bert": ("BertConfig", SMALL_BERT),
    "bert without a head": ("BertConfig", {**SMALL_BERT, "architectures": ["BertModel"]}),
}
ALL = {**CASES, **MORE}


def written(case, folder):
    """Makes the folder of a case."""
    if case == "rwkv7":
        theirs_in(folder)
    else:
        name, settings = ALL[case]
        kind = settings.get("architectures", [None])[0]
        hub.make(name, settings, folder, kind=kind)


@pytest.mark.parametrize("case", [*ALL, "rwkv7"])
def test_the_files_that_come_out_are_those_that_went_in(case, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    written(case, folder)
    hub.export_again(folder, tmp_path / "out", monkeypatch)
    given = sorted(path.name for path in folder.iterdir())
    assert given == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in given:
        if name.endswith(".safetensors"):
            assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    want = json.loads((folder / "config.json").read_text())
    got = json.loads((tmp_path / "out" / "config.json").read_text())
    differing = {
        key: (want.get(key, "absent"), got.get(key, "absent"))
        for key in want.keys() | got.keys()
        if want.get(key, "absent") != got.get(key, "absent")
    }
    assert differing == {}


def test_no_adapter_is_left_out(tmp_path):
    kinds = {"rwkv7"}
    for case in ALL:
        (tmp_path / case).mkdir()
        written(case, tmp_path / case)
        kinds.add(read_config(tmp_path / case)["model_type"])
    assert kinds == set(ADAPTERS)
