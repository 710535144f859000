"""The loop that `bench steps` holds the quickstart against trains the same model."""

import pytest
import torch

from models.micro_batch import MicroBatch
from models.span import Span
from scripts.benchmarks import steps
from scripts.benchmarks.plain_model import PlainDecoder, document_mask
from trainer.config.build_model import build_model, ffn_width
from trainer.preflight.prepare import load_config

SMALL = ("experiment=quickstart", "model.width=24", "model.layers=2", "model.heads=4")
VOCABULARY = 11
NAMES = {
    "mixer_norm": "attention_norm",
    "mixer.q": "query",
    "mixer.k": "key",
    "mixer.v": "value",
    "mixer.out": "out",
    "feedforward.gate": "gate",
    "feedforward.up": "up",
    "feedforward.down": "down",
}


def plain_name(name):
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def test_the_plain_model_is_the_one_of_the_quickstart():
    config = load_config([*SMALL, "context_length=16", "batch_tokens=32"])
    ours = build_model(config, VOCABULARY).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    plain = PlainDecoder(
        vocabulary=VOCABULARY,
        width=24,
        layers=2,
        heads=4,
        kv_heads=config.model.kv_heads,
        ffn=ffn_width(config),
        context=16,
    ).double()
    plain.load_state_dict({plain_name(name): value for name, value in ours.state_dict().items()})
    tokens = torch.randint(VOCABULARY, (2, 17), generator=generator)
    documents = torch.tensor([[0] * 5 + [1] * 11, [0] * 16])
    starts = torch.tensor([[0] * 5 + [5] * 11, [0] * 16])
    span = Span.of(torch.arange(16) - starts, documents)
    losses = ours(MicroBatch(tokens[:, :-1], span, tokens[:, 1:], None))
    theirs = plain(tokens[:, :-1], tokens[:, 1:], document_mask(documents))
    # Positions of theirs count from the beginning of the row: only differences matter.
    torch.testing.assert_close(theirs, losses.mean(), rtol=1e-6, atol=0)
    unmasked = plain(tokens[:, :-1], tokens[:, 1:], None)
    assert abs(unmasked - theirs) > 1e-3


def test_the_table_holds_ours_against_theirs():
    rows = [
        {
            "name": name,
            "step_s": seconds,
            "fastest_s": seconds,
            "tokens_per_second": 4096 / seconds,
            "first_step_s": 9.0,
            "starting_s": 6.0,
            "building_s": 3.0,
        }
        for name, seconds in (("quickstart", 1.0), (steps.MASKED, 1.5), (steps.LLAMA, 0.9))
    ]
    table = steps.table(rows)
    assert "1.50 x  1.4 x  plain, dense mask" in table
    assert "0.90 x  1.0 x  transformers" in table
    assert "step 1: 9.0 s; 6.0 until" in table


def test_several_ranks_are_refused():
    with pytest.raises(ValueError, match="ranks=2: each entry starts its own"):
        steps.parse(["ranks=2"])
