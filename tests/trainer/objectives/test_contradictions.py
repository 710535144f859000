"""An objective that the model, the data or the evaluation contradicts is refused, with the way
out."""

import pytest
import torch

from trainer.config.build_model import build_model
from trainer.config.compose import compose
from trainer.objectives.contradictions import remarks
from trainer.objectives.stream import vocabulary_of
from trainer.preflight.check import check_config

SMALL = ["context_length=64", "batch_tokens=128"]


def faults(words: str) -> list[str]:
    asked = compose([*SMALL, *words.split()])
    return (
        asked.faults
        if asked.config is None
        else check_config(asked.config, asked.given, asked.mended, asked.faults)
    )


FINE = [
    "",
    "objective=masked",
    "model=bidirectional objective=masked",
    "model=bidirectional objective=masked position=t5 position.bidirectional=true",
    "mixer=longformer mixer.symmetric=true objective=masked",
    "mixer=bigbird mixer.symmetric=true mixer.block=8 objective=masked",
    "model=prefix model.mixers.prefix.length=32",
    "mixer=prefix mixer.length=0",
    "mixer=prefix mixer.length=0 objective=span_corruption",
    "objective=span_corruption",
    "mixer=mamba2 objective=span_corruption",
    "memory=tokens memory.length=3 memory.segment=16",
    "objective=masked memory=segments memory.length=8",
    "mixer=compressed mixer.block=4",
    "mixer=hyena",
    "model=bidirectional data=copy",  # answers are no tokens of the row
    "model=bidirectional objective=masked model.vocabulary=258",
]

WRONG = [
    (
        "model=bidirectional",
        [
            "objective=next_token",
            "blocks.0.mixer (Bidirectional)",
            "3 more layers",
            "objective=masked",
        ],
    ),
    (
        "mixer=bidirectional model.layers=1",
        ["blocks.0.mixer (Bidirectional) shows", "objective=masked"],
    ),
    ("mixer=longformer mixer.symmetric=true", ["Longformer", "objective=masked"]),
    ("mixer=bigbird mixer.symmetric=true", ["BigBird", "objective=masked"]),
    (
        (
            "model.pattern=[full,other]"
            " model.mixers.other._target_=models.attention.bidirectional.Bidirectional"
        ),
        ["blocks.1.mixer (Bidirectional), like 1 more layer,", "objective=masked"],
    ),
    (
        "model=bidirectional memory=tokens memory.length=3 memory.segment=16",
        ["Bidirectional", "objective=masked"],
    ),
    ("model=bidirectional data=facts", ["Bidirectional", "objective=masked"]),
    (
        "model=bidirectional objective=span_corruption",
        ["objective=span_corruption", "Bidirectional", "objective=masked"],
    ),
    (
        "model=prefix objective=span_corruption",
        ["objective=span_corruption", "64 tokens", "model.mixers.prefix.length=0"],
    ),
    ("mixer=prefix objective=span_corruption", ["PrefixAttention", "mixer.length=0"]),
    (
        "model=prefix model.mixers.prefix.length=65",
        ["65 tokens", "context_length=64", "model.mixers.prefix.length=32"],
    ),
    (
        "position=t5 position.bidirectional=true",
        ["position.bidirectional=true", "position.bidirectional=false", "objective=masked"],
    ),
    ("objective=masked data=copy", ["objective=masked", "Copy", "objective=next_token"]),
    (
        "objective=span_corruption data=facts",
        ["objective=span_corruption", "Facts", "objective=next_token"],
    ),
    (
        "objective=masked evaluation.sample_tokens=5",
        ["evaluation.sample_tokens=5", "objective=masked", "evaluation.sample_tokens=0"],
    ),
    (
        "objective=masked model.vocabulary=257",
        ["model.vocabulary=257", "adds 1", "model.vocabulary=258"],
    ),
    (
        "objective=span_corruption memory=segments memory.length=8",
        ["memory=segments", "memory=none"],
    ),
    (
        "objective=span_corruption objective.sentinels=3",
        ["objective.sentinels=3", "objective.sentinels=4"],
    ),
    ("objective=masked objective.probability=2", ["objective.probability=2", "0.15"]),
    (
        "objective=masked objective.probabilty=1",
        ["objective.probabilty=1", "objective.probability"],
    ),
    ("objective=maskd", ["objective=maskd", "objective=masked"]),
    (
        "objective._target_=models.carried_state.CarriedState",
        ["objective._target_=models.carried_state.CarriedState", "objective=next_token"],
    ),
    (
        "objective=span_corruption context_length=3 batch_tokens=3",
        ["context_length=3", "context_length=64"],
    ),
]


@pytest.mark.parametrize("words", FINE)
def test_what_goes_together_is_taken(words):
    assert faults(words) == []


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[words for words, _ in WRONG])
def test_a_contradiction_is_refused_in_one_message(words, said):
    found = faults(words)
    assert len(found) == 1, found
    assert all(each in found[0] for each in said), found[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", []),
        ("model=bidirectional objective=masked", []),
        ("objective=span_corruption", []),
        ("objective=masked", ["no layer sees what comes after a token"]),
        ("model=prefix objective=masked", ["no layer sees what comes after a token"]),
        (
            "model=bidirectional objective=masked position=t5",
            ["position.bidirectional=true tells them apart"],
        ),
    ],
)
def test_what_is_allowed_and_may_not_be_meant_is_said_in_one_line(words, said):
    config = compose([*SMALL, *words.split()]).config
    assert config is not None
    with torch.device("meta"):
        model = build_model(config, vocabulary_of(config))
    lines = remarks(config, model)
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines))
