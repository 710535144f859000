"""Every file of conf/ composes, and every model in it builds; no unknown key gets through
anywhere."""

import re

import pytest
import torch

from models.init import initial_tensor
from trainer.config import build_model, instantiate
from trainer.config.compose import compose
from trainer.config.explain import known_keys
from trainer.config.groups import CONF, choices, groups
from trainer.config.node_checks import as_node
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.preflight.check import check_config

VOCABULARY = 257


def composed(*words: str) -> Config:
    wish = compose(words)
    assert not wish.faults
    assert wish.config is not None
    return wish.config


BUILT_BELOW = ("mixer", "model", "experiment", "experiment/needle")
ALL = [(group, name) for group in groups() if group not in BUILT_BELOW for name in choices(group)]


@pytest.mark.parametrize(("group", "name"), ALL, ids=lambda each: str(each))
def test_every_choice_of_every_group_composes(group: str, name: str) -> None:
    composed(f"{group}={name}")


@pytest.mark.parametrize("name", choices("mixer"))
def test_every_mixer_builds_without_memory_and_refuses_a_setting_it_does_not_have(
    name: str,
) -> None:
    config = composed("model=decoder", f"mixer={name}", "model.layers=2")
    with torch.device("meta"):
        model = build_model.build_model(config, VOCABULARY)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(model.blocks) == 2  # pyright: ignore
    wrong = {**as_node(config.mixer), "raech": 3}  # pyright: ignore
    with pytest.raises(UserError, match=r"mixer\.raech=3: \w+ has no such setting"):
        instantiate.instantiate(wrong, build_model.offered_sizes(config, VOCABULARY), "mixer")


BASES = ("decoder", "hub")  # the one has no mixers, the other needs a folder
OBJECTIVES = {
    # of a model that sees what the usual objective asks for
    "bidirectional": ["objective=masked"],
    # of models of sets and of graphs
    **{key: ["data=sets"] for key in ("deep_sets", "set_transformer")},
    "gat": ["data=graphs"],
    "multimodal": ["data=requests"],
    # of models that read a source
    **{key: ["data=reverse"] for key in ("encoder_decoder", "seq2seq", "t5", "transformer")},
}


@pytest.mark.parametrize(
    "words",
    [[f"model={name}", *OBJECTIVES.get(name, [])] for name in choices("model") if name not in BASES]
    + [[f"experiment={name}"] for name in choices("experiment")],
    ids=" ".join,
)
def test_every_model_and_experiment_passes_the_check(words: list[str]) -> None:
    assert check_config(composed(*words)) == []


@pytest.mark.parametrize("name", choices("experiment/needle"))
def test_every_part_of_an_experiment_passes_the_check(name: str) -> None:
    assert check_config(composed("experiment=needle", f"experiment/needle={name}")) == []


def test_a_part_of_an_experiment_is_chosen_with_it_and_by_its_name() -> None:
    assert "experiment/needle" in groups()
    alone = compose(["experiment/needle=sinks"]).faults
    assert alone == [
        "experiment/needle: its choices are those of experiment=needle; write that as well"
    ]
    misspelt = compose(["experiment=needle", "experiment/needle=snks"]).faults
    assert len(misspelt) == 1 and "did you mean experiment/needle=sinks?" in misspelt[0]


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_an_unknown_key_is_a_fault_in_every_group_also_after_a_plus(plus: str) -> None:
    places = sorted({key.rpartition(".")[0] for key in known_keys()} | {"data"})
    keys = [f"{place}.wrongly" if place else "wrongly" for place in places]
    wish = compose(["mixer=full", *(f"{plus}{key}=1" for key in keys)])
    faults = check_config(wish.config, known=wish.faults, mended=wish.mended)  # pyright: ignore
    assert sorted(fault.partition("=")[0] for fault in faults) == sorted(keys)
    assert all("=1: " in fault and "no such setting" in fault for fault in faults)


def test_a_pattern_is_repeated_and_cut_to_the_layers() -> None:
    words = ["model=sliding", "model.mixers.full._target_=models.attention.full.Attention"]
    config = composed(*words, "model.pattern=[sliding,full]", "model.layers=5")
    assert build_model.mixer_labels(config) == ["sliding", "full", "sliding", "full", "sliding"]


def test_a_mixer_replaces_the_whole_pattern() -> None:
    config = composed("model=full", "mixer=multi_query", "model.layers=3")
    with torch.device("meta"):
        model = build_model.build_model(config, VOCABULARY)
    assert [type(block.mixer).__name__ for block in model.blocks] == ["MultiQuery"] * 3  # pyright: ignore


def test_a_class_takes_the_sizes_that_its_signature_has() -> None:
    taken = build_model.sizes_taken(composed("mixer=multi_query", "model.width=64"), VOCABULARY)
    assert taken["mixer"] == {"width": 64, "heads": 4, "position": "Rope"}
    assert taken["model"]["vocabulary"] == VOCABULARY


@pytest.mark.parametrize(("ffn", "width"), [("2.75", 352), ("100", 100), ("2.01", 264)])
def test_a_feed_forward_width_is_a_multiple_or_itself(ffn: str, width: int) -> None:
    assert build_model.ffn_width(composed(f"model.ffn={ffn}")) == width


def test_the_engine_follows_the_ranks_unless_it_is_chosen() -> None:
    assert composed().engine.name == "single"
    assert composed("parallel.context=2").engine.name == "fsdp"
    assert composed("parallel.data=2", "engine.checkpointing=full").engine.checkpointing == "full"
    assert composed("parallel.data=2", "engine=single").engine.name == "single"


def test_the_config_folder_is_found_from_any_directory(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CONF.is_absolute()
    assert composed("experiment=quickstart").name == "quickstart"


CHANNEL_MIX = "model.feedforwards.mix._target_=models.recurrent.rwkv_layers.ChannelMix"


def kinds(config: Config) -> list[str]:
    with torch.device("meta"):
        model = build_model.build_model(config, VOCABULARY)
    return [type(block.feedforward).__name__ for block in model.blocks]  # pyright: ignore


def test_feed_forward_layers_follow_a_pattern_of_their_own() -> None:
    words = ["model.layers=5", CHANNEL_MIX, "model.feedforward_pattern=[dense,mix]"]
    assert kinds(composed(*words)) == ["SwiGLU", "ChannelMix", "SwiGLU", "ChannelMix", "SwiGLU"]


def test_one_feed_forward_replaces_the_pattern_and_takes_sizes_as_mixers_do() -> None:
    words = ["model.layers=2", "model.ffn=40", "model.feedforward_pattern=[]"]
    words += ["model.feedforward._target_=models.recurrent.rwkv_layers.ChannelMix"]
    config = composed(*words)
    assert kinds(config) == ["ChannelMix"] * 2
    taken = build_model.sizes_taken(config, VOCABULARY)["model.feedforward"]
    assert taken["ffn"] == 40 and taken["layers"] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["model.feedforward_pattern=[dense,mx]", CHANNEL_MIX],
            "model.feedforward_pattern names mx, which model.feedforwards lacks",
        ),
        (
            ["model.feedforward_pattern=[]"],
            "model.feedforward_pattern is empty and model.feedforward is not set",
        ),
        (
            ["model.feedforwards.dense.fnn=3"],
            r"model.feedforwards.dense.fnn=3: SwiGLU has no such setting; did you mean .*\.ffn",
        ),
        (
            ["model.feedforward._target_=models.feedforward.SwiGLUU"],
            "has no class SwiGLUU; did you mean SwiGLU",
        ),
        (["model.feedforward.ffn=3"], "model.feedforward._target_ is not set"),
    ],
)
def test_feed_forward_wishes_that_cannot_be_are_faults(words: list[str], said: str) -> None:
    wish = compose(words)
    assert any(
        re.search(said, fault)
        for fault in check_config(wish.config, known=wish.faults, mended=wish.mended)
    )  # pyright: ignore


def test_the_down_projections_of_every_kind_of_feed_forward_start_smaller_with_depth() -> None:
    config = composed("model=rwkv7", "model.width=128", "model.layers=8")
    with torch.device("meta"):
        model = build_model.build_model(config, VOCABULARY)
    down = initial_tensor(model, "blocks.3.feedforward.down.weight", 0)
    assert abs(down.std().item() / (0.02 / 4) - 1) < 0.05
