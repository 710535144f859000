"""match=parameters|flops: variants become as large, or as dear, as full attention of the same
settings."""

import pytest
import torch

from models.cost.flops import count_flops
from models.cost.parameters import count_parameters
from models.span import Span
from trainer.config import build_model
from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.objectives.stream import vocabulary_of
from trainer.preflight.match import match_sizes, reference
from trainer.preflight.prepare import load_config

VOCABULARY = 257
SIZES = ("context_length=256", "batch_tokens=256", "model.width=96", "model.layers=4")


def composed(*words: str) -> Config:
    config = compose(words).config
    assert config is not None
    return config


def costs(config: Config) -> tuple[int, int]:
    with torch.device("meta"):
        model = build_model.build_model(config, VOCABULARY)
    return count_parameters(model).total, count_flops(model).training(
        Span.line(1, config.context_length)
    )


def parameters(config: Config, vocabulary: int) -> int:
    with torch.device("meta"):
        return count_parameters(build_model.build_model(config, vocabulary)).total


@pytest.mark.parametrize(
    "model", ["sliding", "retnet", "rwkv7", "switch", "lstm"]
)  # an lstm has no feed-forward width
@pytest.mark.parametrize(("match", "which"), [("parameters", 0), ("flops", 1)])
def test_a_variant_comes_within_three_percent_of_full_attention(
    model: str, match: str, which: int
) -> None:
    words = (*SIZES, f"model={model}", f"match={match}")
    goal = costs(composed(*SIZES, "model=full"))[which]
    fitted, said = match_sizes(composed(*words), words)
    assert abs(costs(fitted)[which] / goal - 1) < 0.03
    assert fitted.model.width % (2 * fitted.model.heads) == 0
    assert f"set model.width={fitted.model.width}" in said
    assert "of model=full at model.width=96" in said


@pytest.mark.parametrize(
    "own",
    [
        ("model=seq2seq", "model.attention=bahdanau", "data=reverse"),
        ("model=encoder_decoder", "model.encoder_layers=2", "data=reverse"),
        ("model=set_transformer", "model.points=null", "data=sets"),
        ("model=deep_sets", "model.pooling=mean", "data=sets"),
        ("model=gat", "model.scoring=mean", "data=graphs"),
    ],
    ids=lambda own: own[0],
)
def test_models_of_other_shapes_become_as_large(own: tuple[str, ...]) -> None:
    words = (*SIZES, *own, "evaluation.sample_tokens=0", "match=parameters")
    fitted, _ = match_sizes(composed(*words), words)
    # The data says how many tokens there are.
    vocabulary = vocabulary_of(fitted)
    full = reference(composed(*words), words)
    same = composed(*SIZES, "model=full", own[-1], "evaluation.sample_tokens=0")
    goal = parameters(same, vocabulary)
    assert parameters(full, vocabulary) == goal
    assert abs(parameters(fitted, vocabulary) / goal - 1) < 0.06
    assert fitted.model.width != 96


@pytest.mark.parametrize("match", ["parameters", "flops"])
def test_full_attention_stays_as_it_is(match: str) -> None:
    words = (*SIZES, "model=full", f"match={match}")
    fitted, said = match_sizes(composed(*words), words)
    assert fitted == composed(*words)
    assert "+0.00%" in said


def test_the_command_takes_the_width_and_says_so(capsys) -> None:
    fitted = load_config([*SIZES, "model=rwkv7", "match=parameters"])
    assert fitted.model.width < 96
    assert f"match=parameters: set model.width={fitted.model.width}" in capsys.readouterr().out
    assert load_config([*SIZES, "model=rwkv7"]).model.width == 96
    assert not capsys.readouterr().out


def test_a_feed_forward_width_that_was_set_by_hand_stays() -> None:
    words = (*SIZES, "model=rwkv7", "match=parameters", "model.ffn=200")
    fitted, said = match_sizes(composed(*words), words)
    assert fitted.model.ffn == 200
    assert "model.ffn" not in said


def test_the_reference_has_full_attention_whatever_the_settings_change_in_the_layers() -> None:
    words = (
        *SIZES,
        "model=switch",
        "mixer=retention",
        "mixer.expand=1",
        "memory=tokens",
        "model.kv_heads=2",
        "match=flops",
    )
    found = reference(composed(*words), words)
    truth = composed(*SIZES, "model=full", "model.kv_heads=2", "match=flops")
    assert costs(found) == costs(truth)


def test_the_reference_has_no_memory_that_a_recipe_brings() -> None:
    words = ("experiment=needle", "experiment/needle=infini")
    found = reference(composed(*words), words)
    truth = composed("experiment=needle", "model.pattern=[full]")
    assert found.memory.name == "none" and costs(found) == costs(truth)
    fitted, said = match_sizes(composed(*words), words)
    assert fitted.memory.name == "compressive" and "+0.21% of the" in said


def test_wide_heads_get_widths_that_kernels_like() -> None:
    words = (
        "model.width=512",
        "model.heads=8",
        "model.layers=2",
        "model=retention",
        "match=parameters",
    )
    fitted, _ = match_sizes(composed(*words), words)
    assert fitted.model.width % 64 == 0


def test_what_cannot_be_fitted_is_refused_with_a_way_out() -> None:
    words = (
        "model.width=16",
        "model.ffn=4000",
        "model.layers=2",
        "model=switch",
        "match=parameters",
    )
    with pytest.raises(
        UserError,
        match=r"no width comes near .*; use another model\.width or model\.layers, or match=none",
    ):
        match_sizes(composed(*words), words)
    with pytest.raises(UserError, match=r"model\.width=96: must divide among model\.heads=5"):
        load_config([*SIZES, "model.heads=5", "match=parameters"])
