"""What a rank holds: its share of parameters and optimiser state, and as much of a forward as
models/cost/flops.py says."""

import gc

import numpy as np
import pytest
import torch

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.attention.sliding import Sliding
from models.cost.activation_memory import activation_bytes, host_bytes, state_bytes
from models.feedforward import SwiGLU
from models.micro_batch import MicroBatch
from models.positions.rope import Rope
from models.span import Span
from parallel.activation_offload import ActivationOffload
from parallel.engines.fsdp import Fsdp
from parallel.engines.materialize import materialize
from parallel.engines.single import Single
from parallel.mesh import Mesh, build_mesh
from parallel.parallelize import parallelize
from tests.support.live import Live, everything, storages
from tests.support.pool import ranks
from trainer.config.build_model import build_model
from trainer.config.compose import compose
from trainer.optim.adamw import AdamW

WORDS = 257  # no number of ranks divides it
WIDTH, FFN, LAYERS, TOKENS = 128, 352, 4, 512
OPTIM = AdamW(learning_rate=1e-3)


def decoder(width=WIDTH, ffn=FFN, layers=LAYERS, kv=4, tie=False, reach=None):
    with torch.device("meta"):
        mixers = [
            (
                Sliding(width, 4, kv, Rope(), window=reach)
                if reach and layer % 2
                else Attention(width, 4, kv, Rope())
            )
            for layer in range(layers)
        ]
        feedforwards = [SwiGLU(width, ffn) for _ in range(layers)]
        return Decoder(WORDS, width, mixers, feedforwards, position=Rope(), tie_embeddings=tie)


def held(env, name, sizes):
    """(parameters, moments, gradients, all that appeared with the engine) in bytes on this rank,
    after a step's backward."""
    before = everything()
    engine = {"single": Single, "fsdp": Fsdp}[name](build_mesh(1, env.size), OPTIM, seed=1)
    engine.wrap(decoder(**sizes))
    tokens = torch.arange(9)[None] * (1 + env.rank)
    for _ in range(2):
        engine.backward(engine.model(MicroBatch(tokens, Span.line(1, 9), tokens)).sum() / 36)
        gradients = storages(p.grad for p in engine.parameters.values() if p.grad is not None)
        gathered = everything() - before
        engine.step(1e-3)
    parameters = storages(engine.parameters.values())
    moments = storages(x for state in engine.optimiser.state.values() for x in state.values())
    return parameters, moments, gradients, gathered


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({}, marks=pytest.mark.full),
        pytest.param({"tie": True}, marks=pytest.mark.full),
        {"width": 40, "ffn": 101, "kv": 2, "tie": True},
    ],
)
def test_fsdp_on_four_ranks_holds_a_quarter_of_what_one_rank_holds(sizes):
    sizes = {"layers": 2, **sizes}
    alone = ranks(1, held, "single", sizes)[0]
    told = state_bytes(decoder(**sizes))
    assert alone[0] == told["parameters"] == alone[2]
    for mine in ranks(4, held, "fsdp", sizes):
        for what, part, all_of_it in zip(
            ("parameters", "moments", "gradients", "all"), mine, alone, strict=True
        ):
            assert 0 < part <= 1.1 / 4 * all_of_it, (
                f"{what}: {part} of {all_of_it} bytes, {part / all_of_it:.3f}"
            )


@pytest.fixture
def one_thread():
    """Kernels hold buffers for each thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measured(checkpointing, sizes, offload=None):
    """(bytes alive between forward and backward, most bytes alive at once) of a step whose
    gradients have their place."""
    engine = Single(Mesh.alone(), OPTIM, checkpointing=checkpointing)
    parallelize(decoder(**sizes), engine, offload=offload)
    for parameter in engine.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens, span = torch.arange(TOKENS)[None] % WORDS, Span.line(1, TOKENS)
    engine.model(
        MicroBatch(tokens, span, tokens)
    ).sum().backward()  # the span keeps its masks: they are no activations
    gc.collect()
    with Live() as live:
        loss = engine.model(MicroBatch(tokens, span, tokens)).sum()
        kept = live.now
        loss.backward()
    return kept, live.peak


@pytest.mark.short("sizes1")
@pytest.mark.parametrize("sizes", [{}, {"kv": 2, "tie": True, "reach": 100}])
def test_the_peak_of_a_step_and_what_checkpointing_saves_of_it_are_as_predicted(one_thread, sizes):
    found = {each: measured(each, sizes) for each in ("none", "full", "selective")}
    told = {each: activation_bytes(decoder(**sizes), TOKENS, checkpointing=each) for each in found}
    assert found["none"][0] == pytest.approx(told["none"], rel=0.01)
    for each, (_, peak) in found.items():
        assert peak == pytest.approx(told[each], rel=0.1), each
    for each in ("full", "selective"):
        assert found["none"][1] - found[each][1] == pytest.approx(
            told["none"] - told[each], rel=0.15
        ), each
    tapes = found["selective"][0] - found["full"][0]
    assert tapes == LAYERS * TOKENS * 4 * (WIDTH + 4), (
        "a mean and a mass for every head of every layer"
    )
    assert told["selective"] - told["full"] == tapes * (LAYERS - 1) / LAYERS, (
        "of the block computed again they are in it"
    )


@pytest.mark.short("none")
@pytest.mark.parametrize(
    "checkpointing", ["none", pytest.param("full", marks=pytest.mark.full), "selective"]
)
def test_offload_lowers_the_peak_by_what_is_predicted_and_the_host_holds_as_much(
    one_thread, checkpointing
):
    """The host's copies are memory of numpy's, which is not counted: what is counted stands for a
    device."""
    sizes = {"layers": 2 * LAYERS, "kv": 2, "tie": True}
    offload = ActivationOffload(
        torch.device("cpu"), lambda size: torch.from_numpy(np.empty(size, np.uint8))
    )
    (_, plain), (kept, peak) = (measured(checkpointing, sizes, each) for each in (None, offload))
    model = decoder(**sizes)
    told, lower = (
        activation_bytes(model, TOKENS, checkpointing=checkpointing, offload=each)
        for each in (False, True)
    )
    assert plain - peak == pytest.approx(told - lower, rel=0.15)
    assert peak < 1.15 * lower, "a bound where nothing is computed again"
    assert kept < 0.2 * lower, (
        "between forward and backward only what is outside of the blocks stays"
    )
    steps = 2
    assert offload.sent / steps == pytest.approx(
        host_bytes(model, TOKENS, checkpointing=checkpointing), rel=0.01
    )


@pytest.mark.short("hyena", "rwkv7", "mamba2", "switch")
@pytest.mark.parametrize(
    "model", ["hyena", "retention", "rwkv7", "mamba2", "compressed", "lsh", "switch"]
)
def test_other_layers_hold_between_forward_and_backward_what_is_predicted(one_thread, model):
    words = [
        f"model={model}",
        "model.width=32",
        "model.layers=2",
        "model.heads=4",
        "context_length=256",
        "batch_tokens=256",
    ]
    config = compose(words).config
    assert config is not None
    with torch.device("meta"):
        built = build_model(config, WORDS)
    told = activation_bytes(built, 256)
    materialize(built, torch.device("cpu"), seed=0)
    tokens, span = torch.arange(256)[None], Span.line(1, 256)
    built(MicroBatch(tokens, span, tokens))
    with Live() as live:
        losses = built(MicroBatch(tokens, span, tokens))
        assert live.now == pytest.approx(told, rel=0.1), losses.shape


def test_sizes_refuses_checkpointing_that_is_none_or_that_has_no_blocks():
    with pytest.raises(ValueError, match="checkpointing=some is not offered"):
        activation_bytes(decoder(), 64, checkpointing="some")
    with pytest.raises(ValueError, match="Linear has no blocks to compute again"):
        activation_bytes(torch.nn.Linear(2, 2), 64, checkpointing="full")
    with pytest.raises(
        ValueError, match="Linear has no blocks whose activations could wait on the host"
    ):
        host_bytes(torch.nn.Linear(2, 2), 64)
