"""The doctor finds nothing wrong where nothing is, and finds every way in which a driver is broken
on purpose."""

import pytest
import torch

from parallel.mesh import Mesh, build_mesh
from tests.support.pool import ranks
from trainer.preflight.prepare import load_config
from trainer.preflight.reach import fitting
from trainer.verify.diagnosis import TOKENS, packed_rows, worst_gradient
from trainer.verify.doctor import Examination, build_noisy_model, small_twin
from trainer.verify.doctor_checks import check_reach
from trainer.verify.sabotage import BREAKS

QUICK = (
    "experiment=quickstart",
    "wandb.mode=disabled",
    "log.plots=false",
    "model.layers=2",
    "model.heads=4",
    "model.kv_heads=2",
)


MASKED = ("objective=masked", "evaluation.sample_tokens=0")
OF_PAIRS = ("data=reverse", "evaluation.sample_tokens=0")


def examine(env, words, sabotage):
    config = load_config(fitting((*QUICK, f"parallel.context={env.size}", *words)))
    mesh = build_mesh(env.size, 1, ulysses=config.parallel.ulysses, ring=config.parallel.ring)
    return list(Examination(config, mesh, sabotage).findings())


FULL = pytest.mark.full


@pytest.mark.parametrize(
    "words",
    [
        ("parallel.method=ring",),
        ("mixer=gated_linear",),
        (
            "mixer=bidirectional",
            *MASKED,
            "position=t5",
            "position.bidirectional=true",
            "parallel.layout=balanced",
        ),
        pytest.param(
            ("model=encoder_decoder", *OF_PAIRS, "parallel.layout=contiguous"), marks=FULL
        ),
        # The others differ in a mask, a layout or an attention: parallel/ compares these.
        pytest.param(("parallel.method=ulysses", "parallel.layout=contiguous"), marks=FULL),
        pytest.param(
            (
                "mixer=sliding",
                "mixer.window=300",
                "parallel.method=allgather",
                "parallel.layout=balanced",
            ),
            marks=FULL,
        ),
        pytest.param(
            (
                "mixer=prefix",
                "mixer.length=0",
                "objective=span_corruption",
                "evaluation.sample_tokens=0",
                "parallel.method=allgather",
            ),
            marks=FULL,
        ),
        pytest.param(("model=seq2seq", "model.attention=local_p", *OF_PAIRS), marks=FULL),
        pytest.param(
            ("model=multimodal", "data=requests", "evaluation.sample_tokens=0"), marks=FULL
        ),
    ],
    ids=" ".join,
)
def test_a_sound_config_passes(words):
    findings = ranks(3, examine, words, None)[0]
    assert [f for f in findings if not f.passed] == []
    of_source = {"source"} if "data=reverse" in words else set()
    assert {f.check for f in findings} - of_source == {
        "parity",
        "causality",
        "documents",
        "padding",
        "reach",
        "evaluation",
    }
    assert of_source <= {f.check for f in findings}


@pytest.mark.parametrize("sabotage", BREAKS)
@pytest.mark.parametrize(
    "words", ["parallel.method=ring", "parallel.method=ulysses", "mixer=gated_linear"]
)
def test_a_broken_driver_is_caught(words, sabotage):
    findings = ranks(3, examine, (words,), sabotage)[0]
    assert [f for f in findings if not f.passed], f"{sabotage} went unseen"


def examine_sets(env):
    words = ("wandb.mode=disabled", "evaluation.sample_tokens=0", f"parallel.context={env.size}")
    config = load_config(("model=set_transformer", "model.seeds=1", "data=sets", *words))
    return list(Examination(config, build_mesh(env.size, 1), None).findings())


def test_a_block_over_a_single_seed_passes():
    # Its queries and keys have a gradient of rounding alone.
    findings = ranks(3, examine_sets)[0]
    assert [f for f in findings if not f.passed] == [] and len(findings) > 5


def test_a_gradient_of_rounding_alone_is_compared_in_units_of_the_largest():
    large = torch.tensor([2.0, -1.0], dtype=torch.float64)
    expected = {"v": large, "k": large * 1e-17}
    assert worst_gradient({"v": large, "k": large * -3e-17}, expected)[0] < 1e-15
    assert worst_gradient({"v": large, "k": large * 1e-9}, expected) == (pytest.approx(1e-9), "k")
    # What is small and no rounding has digits.
    small = {"v": large, "k": large * 1e-12}
    assert worst_gradient({"v": large, "k": large * 1.1e-12}, small) == (pytest.approx(0.1), "k")
    broken = {"v": large * torch.nan, "k": expected["k"]}
    assert worst_gradient(broken, expected) == (float("inf"), "v")


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


def test_a_layer_that_does_not_reach_says_why():
    def figures(*words):
        config = small_twin(load_config(fitting((*QUICK, *words))))
        model = build_noisy_model(config)
        tokens = torch.arange(2 * TOKENS).reshape(2, TOKENS) % 29
        return list(check_reach(model, tokens, packed_rows(), Mesh.alone()))

    for words, reason in (
        (("mixer=sliding", "mixer.window=100"), "its mask hides the first token"),
        (("mixer=short_conv",), "its filter is short"),
    ):
        lines = figures(*words)
        assert [line.passed for line in lines] == [True, True]
        assert all(line.figure == 0 and reason in line.note for line in lines)
    assert all(line.figure > 0 for line in figures("mixer=gated_delta"))


class Forgetful(torch.nn.Module):
    """A layer that passes nothing on from token to token, and has no reason for it."""

    def forward(self, hidden, span):
        return hidden * 2


def test_a_layer_without_reach_and_reason_is_a_fault():
    config = small_twin(load_config(fitting(QUICK)))
    model = build_noisy_model(config)
    model.blocks[1].mixer = Forgetful()
    tokens = torch.arange(2 * TOKENS).reshape(2, TOKENS) % 29
    first, second = check_reach(model, tokens, packed_rows(), Mesh.alone())
    assert first.passed and not second.passed and "no part says why" in second.note


def with_fault(env, place):
    """A driver that is right but for one fault: what the doctor then finds."""
    config = load_config(fitting((*QUICK, f"parallel.context={env.size}", "parallel.method=ring")))
    mesh = build_mesh(env.size, 1)
    examination = Examination(config, mesh)
    layer = examination.shared.blocks[0].mixer

    def spoil(module, args, output):
        alone = int((args[1].valid()).any()) == 0
        if place == "padding" and not alone:
            # The ranks that hold no token lend their first neighbour something.
            few = bool(args[1].sharding.whole.valid().sum() < 20)
            return output * (1.001 if few else 1.0)
        if place == "evaluation" and not torch.is_grad_enabled():
            return output * 1.001
        return output

    layer.register_forward_hook(spoil)
    return [line for line in examination.findings() if not line.passed]


@pytest.mark.parametrize("place", ["padding", "evaluation"])
def test_a_fault_of_evaluation_or_of_empty_ranks_alone_is_seen(place):
    lines = ranks(3, with_fault, place)[0]
    assert place in {line.check for line in lines}
