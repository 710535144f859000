"""A class that replaces another takes none of its defaults; what was said with it stays."""

import pytest

from trainer.config.compose import compose
from trainer.config.node_checks import as_node

LEARNED = "models.positions.learned.Learned"
MINE = f"position._target_={LEARNED}"


def composed(*words):
    found = compose(words)
    assert found.config is not None
    assert not found.faults, found.faults
    return found.config


@pytest.mark.parametrize("choice", [[], ["position=yarn", "position.factor=2"]])
def test_defaults_of_the_replaced_class_are_gone(choice):
    node = as_node(composed(*choice, MINE).position)
    assert set(node) == {"_target_", *(["factor"] if choice else [])}


def test_settings_that_were_given_stay_and_so_does_the_same_class():
    node = as_node(composed(MINE, "position.length=32").position)
    assert node == {"_target_": LEARNED, "length": 32}
    same = composed("position._target_=models.positions.rope.Rope")
    assert as_node(same.position)["theta"] == 10000.0


def test_what_the_schema_gives_every_class_of_a_place_stays():
    muon = composed("optim=muon", "optim._target_=mine.Optimiser", "optim.momentum=0.5")
    node = as_node(muon.optim)
    assert node["betas"] == (0.9, 0.95)
    assert node["momentum"] == 0.5
    assert "iterations" not in node
    model = composed("model=full", "model._target_=mine.Model").model
    assert model.pattern == ["full"]
    assert not model.model_extra


def test_a_class_within_a_list_of_layers_is_replaced_alone():
    target = "model.mixers.sliding._target_=models.attention.full.Attention"
    config = composed("model=sliding", target)
    assert as_node(config.model.mixers["sliding"]) == {
        "_target_": "models.attention.full.Attention"
    }


def test_a_recipe_replaces_too(tmp_path, monkeypatch):
    (tmp_path / "experiment").mkdir()
    recipe = f"# @package _global_\nposition:\n  _target_: {LEARNED}\n  length: 64\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(recipe)
    monkeypatch.setenv("LONGSPAN_CONFIG_PATH", str(tmp_path))
    assert as_node(composed("experiment=mine").position) == {"_target_": LEARNED, "length": 64}
    over = composed("experiment=mine", "position._target_=mine.Position", "position.scale=2")
    assert as_node(over.position) == {"_target_": "mine.Position", "scale": 2}
