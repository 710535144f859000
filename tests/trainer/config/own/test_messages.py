"""Mistakes in a part of one's own: one message each, before anything starts."""

import pytest

from trainer.errors import UserError
from trainer.preflight.prepare import load_config

PARTS = """
from dataclasses import dataclass, field
from torch import nn
from models.positions.base import Position
from trainer.data.sources.base import Local
from trainer.evaluation.base import Evaluation
from trainer.optim.adamw import AdamW

class Layer(nn.Module):
    def __init__(self, width: int, moon: int): super().__init__()
class Place(Position):
    def __init__(self, moon: int): pass
class Data(Local):
    def __init__(self, *, moon: int, cache: str | None = None): pass
    def files(self): return []
class Judge(Evaluation):
    def __init__(self, *, moon: int): super().__init__()
    def run(self, context): return []
@dataclass(frozen=True)
class Step(AdamW):
    moon: int = field(kw_only=True)
class Cut:
    def __init__(self, moon: int): pass
"""
PLACES = {
    "mixer": "Layer",
    "position": "Place",
    "data": "Data",
    "evaluation.mine": "Judge",
    "optim": "Step",
    "schedule": "Cut",
    "model.feedforward": "Layer",
}


@pytest.fixture(scope="module", autouse=True)
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "moonparts.py").write_text(PARTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@pytest.mark.parametrize("place", PLACES)
def test_what_nobody_gives_is_one_message(place):
    with pytest.raises(UserError) as error:
        load_config(["mixer=full", f"{place}._target_=moonparts.{PLACES[place]}"])
    (line,) = [line for line in str(error.value).splitlines() if "moon" in line]
    assert line.startswith(f"{place}.moon: {PLACES[place]} needs it and it is not set")
    assert f"write {place}.moon=VALUE" in line


def test_what_the_run_offers_is_listed():
    with pytest.raises(UserError, match=r"\(the run gives a class here .*width.*heads"):
        load_config(["mixer._target_=moonparts.Layer"])


@pytest.mark.parametrize("place", PLACES)
def test_a_setting_that_it_does_not_have_is_one_message(place):
    words = [f"{place}._target_=moonparts.{PLACES[place]}", f"{place}.moon=3", f"{place}.mon=3"]
    with pytest.raises(UserError) as error:
        load_config(["mixer=full", *words])
    lines = [line for line in str(error.value).splitlines() if f"{place}.mon" in line]
    assert len(lines) == 1
