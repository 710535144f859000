"""The doctor finds nothing wrong where nothing is, and finds every way in which a driver is broken
on purpose."""

import pytest

from parallel.mesh import build_mesh
from tests.support.pool import ranks
from trainer.preflight.prepare import load_config
from trainer.reach import fitting
from trainer.verify.doctor import TOKENS, Examination, small_twin
from trainer.verify.sabotage import BREAKS

QUICK = (
    "experiment=quickstart",
    "wandb.mode=disabled",
    "model.layers=2",
    "model.heads=4",
    "model.kv_heads=2",
)


MASKED = ("objective=masked", "evaluation.sample_tokens=0")


def examine(env, words, sabotage):
    config = load_config(fitting((*QUICK, f"parallel.context={env.size}", *words)))
    mesh = build_mesh(env.size, 1, ulysses=config.parallel.ulysses, ring=config.parallel.ring)
    return list(Examination(config, mesh, sabotage).findings())


@pytest.mark.parametrize(
    "words",
    [
        ("parallel.method=ring",),
        ("parallel.method=ulysses", "parallel.layout=contiguous"),
        (
            "mixer=sliding",
            "mixer.window=300",
            "parallel.method=allgather",
            "parallel.layout=balanced",
        ),
        ("mixer=gated_linear",),
        (
            "mixer=bidirectional",
            *MASKED,
            "position=t5",
            "position.bidirectional=true",
            "parallel.layout=balanced",
        ),
        (
            "mixer=prefix",
            "mixer.length=0",
            "objective=span_corruption",
            "evaluation.sample_tokens=0",
            "parallel.method=allgather",
        ),
    ],
    ids=" ".join,
)
def test_a_sound_config_passes(words):
    findings = ranks(3, examine, words, None)[0]
    assert [f for f in findings if not f.passed] == []
    assert {f.check for f in findings} == {"parity", "causality", "documents", "padding", "reach"}


@pytest.mark.parametrize("sabotage", BREAKS)
@pytest.mark.parametrize(
    "words", ["parallel.method=ring", "parallel.method=ulysses", "mixer=gated_linear"]
)
def test_a_broken_driver_is_caught(words, sabotage):
    findings = ranks(3, examine, (words,), sabotage)[0]
    assert [f for f in findings if not f.passed], f"{sabotage} went unseen"


def test_a_leak_is_named_a_leak_and_a_look_ahead_a_look_ahead():
    leak = ranks(3, examine, ("parallel.method=ring",), "leak")[0]
    assert not all(f.passed for f in leak if f.check == "documents")
    ahead = ranks(3, examine, ("parallel.method=ring",), "mask")[0]
    assert not all(f.passed for f in ahead if f.check == "causality")


def test_a_mixer_that_looks_ahead_by_design_is_not_blamed_for_it():
    findings = ranks(3, examine, ("mixer=bidirectional", *MASKED, "parallel.method=ring"), None)[0]
    causality = next(f for f in findings if f.check == "causality")
    assert causality.passed and "Bidirectional looks ahead by design" in causality.note


def test_the_small_model_keeps_the_kind():
    config = load_config(
        (*QUICK, "model=hybrid", "model.layers=24", "context_length=4096", "batch_tokens=4096")
    )
    tiny = small_twin(config)
    assert tiny.context_length == TOKENS and tiny.model.layers == len(config.model.pattern)
    assert tiny.model.mixers == config.model.mixers and tiny.model.heads == config.model.heads
    window = small_twin(
        load_config((*QUICK, "mixer=sliding", "mixer.window=1024", "context_length=2048"))
    )
    assert window.mixer is not None and window.mixer.settings()["window"] == round(
        1024 * TOKENS / 2048
    )
