"""A deep model is planned by two shallow ones with the same layers, and nothing differs."""

import pytest
import torch

from trainer.config.build_model import build_model
from trainer.config.compose import compose
from trainer.planning.devices import read_device
from trainer.planning.repeated_layers import ENDS, find_repetition, keep_layers, signature
from trainer.planning.step_plan import plan_step

WORDS = 257
SIZES = (
    "model.width=16",
    "model.layers=10",
    "model.heads=2",
    "context_length=64",
    "batch_tokens=64",
    "launch.force=true",
)
full = pytest.mark.full
CASES = [
    pytest.param(
        "cpu",
        ("engine=fsdp", "parallel.data=2", "batch_tokens=128", "engine.checkpointing=full"),
        marks=full,
    ),
    pytest.param("cpu", ("engine=fsdp", "parallel.context=2", "parallel.method=ring"), marks=full),
    pytest.param(
        "cpu", ("engine=single", "batch_tokens=192", "parallel.micro_batch=1"), marks=full
    ),
    pytest.param(
        "h200",
        (
            "engine=single",
            "precision=bfloat16",
            "engine.checkpointing=selective",
            "engine.offload_activations=true",
            "engine.tile_tokens=16",
        ),
        marks=full,
    ),
    pytest.param("cpu", ("engine=fsdp", "parallel.context=2", "parallel.time=2"), marks=full),
    pytest.param(
        "cpu",
        (
            "engine=fsdp",
            "parallel.context=2",
            "model=moe_topk",
            "parallel.experts=2",
            "model.layers=20",
        ),
        marks=full,
    ),
    pytest.param(
        "cpu",
        (
            "engine=fsdp",
            "parallel.data=2",
            "batch_tokens=128",
            "model=hybrid",
            "model.layers=21",
            "model.pattern=[gated_delta,full]",
        ),
        marks=full,
    ),
]


def config_of(*words):
    config = compose([*SIZES, *words]).config
    assert config is not None
    return config


def built(config):
    with torch.device("meta"):
        return build_model(config, WORDS)


@pytest.mark.parametrize(("device", "words"), CASES)
def test_two_shallow_models_tell_what_the_deep_one_takes(device, words):
    config = config_of(*words)
    assert find_repetition(config, built(config)) is not None
    short = plan_step(config, WORDS, 0, read_device(device))
    whole = plan_step(config, WORDS, 0, read_device(device), every_layer=True)
    # Single numbers, as that of a piece, are not made once a layer.
    for kind, size in whole.by_kind.items():
        assert abs(short.by_kind[kind] - size) <= 64, kind
    assert abs(short.peak_bytes - whole.peak_bytes) <= 64
    assert short.host_bytes == whole.host_bytes
    assert short.sent_bytes == whole.sent_bytes
    assert short.sent_over == whole.sent_over
    assert short.costs.sent == whole.costs.sent
    assert short.costs.flops == pytest.approx(whole.costs.flops, rel=1e-9)
    # An operation over all weights takes no less than an operation takes: that is no line.
    assert short.costs.total_seconds == pytest.approx(whole.costs.total_seconds, rel=0.05)


def test_layers_repeat_by_their_pattern_and_what_comes_before_them_is_kept():
    mixed = config_of("model=hybrid", "model.layers=25", "model.pattern=[full,gated_delta]")
    model = built(mixed)
    found = find_repetition(mixed, model)
    assert found is not None
    assert (found.period, found.times, found.first) == (2, 12, 1)
    before = [signature(block) for block in model.blocks]
    keep_layers(model, found, 2 * ENDS)
    after = [signature(block) for block in model.blocks]
    assert len(after) == 1 + 2 * 2 * ENDS
    assert after[:5] == before[:5]
    assert after[5:] == before[-4:]


def test_layers_that_differ_or_are_few_are_all_planned():
    few = config_of("model.layers=9")
    assert find_repetition(few, built(few)) is None
    config = config_of()
    model = built(config)
    assert find_repetition(config, model) is not None
    model.blocks[5].feedforward.up = torch.nn.Linear(16, 17, bias=False, device="meta")
    assert find_repetition(config, model) is None
