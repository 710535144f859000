"""What blocks save for backward waits on the host, and nothing else changes: not a bit of losses
and gradients."""

import functools
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from models.auxiliary import auxiliary_loss
from models.cost.activation_memory import host_bytes
from models.init import initialise
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.span import Span
from parallel.activation_offload import SMALL, ActivationOffload
from parallel.engines.base import Engine
from parallel.engines.deepspeed import Deepspeed
from parallel.engines.fsdp import Fsdp
from parallel.engines.single import Single
from parallel.layout import layout
from parallel.mesh import Mesh, build_mesh
from parallel.parallelize import parallelize
from parallel.sharding import shard_span
from scripts.benchmarks.offload import OffloadSizes, measure
from tests.parallel.test_parallelize import data, decoder
from tests.support import small_mixture
from tests.support.pool import ranks
from trainer.config.build_model import build_model
from trainer.config.compose import compose
from trainer.optim.adamw import AdamW

CPU = torch.device("cpu")
WAYS = ["none", "full", "selective"]
ENGINES = {
    "single": Single,
    "fsdp": Fsdp,
    **{f"zero{zero}": functools.partial(Deepspeed, zero_stage=zero) for zero in (1, 3)},
}


def aside(size):
    """Room that tests.support.live does not count, as the host's memory is none of a device's."""
    return torch.from_numpy(np.empty(size, np.uint8))


def to_host() -> ActivationOffload:
    return ActivationOffload(CPU, aside)


def named_model(name):
    words = [
        f"model={name}",
        "model.width=32",
        "model.layers=3",
        "model.heads=4",
        "context_length=256",
        "batch_tokens=256",
    ]
    config = compose(words).config
    assert config is not None
    with torch.device("meta"):
        return build_model(config, 257)


@pytest.mark.short("full-selective", "switch-none")
@pytest.mark.parametrize(
    "name, checkpointing",
    [
        *(("full", way) for way in WAYS),
        ("differential", "selective"),
        ("rwkv7", "full"),
        ("hyena", "none"),
        ("switch", "none"),
    ],
)
def test_losses_and_gradients_are_the_same_bits_and_what_left_is_what_was_predicted(
    name, checkpointing
):
    def step(offload):
        engine = Single(Mesh.alone(), AdamW(), checkpointing=checkpointing)
        parallelize(named_model(name), engine, offload=offload)
        losses = engine.model(
            MicroBatch(tokens := torch.arange(256)[None], Span.line(1, 256), tokens)
        )
        sum((each.sum() for each in auxiliary_loss(engine.model).values()), losses.sum()).backward()
        return losses.detach(), {
            key: p.grad for key, p in engine.parameters.items() if p.grad is not None
        }

    offload = to_host()
    torch.testing.assert_close(step(offload), step(None), rtol=0, atol=0)
    assert offload.sent == pytest.approx(
        host_bytes(named_model(name), 256, checkpointing=checkpointing), rel=0.01
    )
    gc.collect()
    assert not offload.copies, "what is not needed any more is not kept on the host either"


def trained(engine: Engine, model: nn.Module, offload, method="auto", rank=0, size=1):
    """(norms, {name: parameter}, bytes that were exchanged) after two steps in micro-batches of a
    row."""
    communicator, norms = parallelize(model, engine, method=method, offload=offload), []
    for step in range(2):
        tokens, targets, span = data(step)
        valid = (targets != IGNORE).sum()
        for row in range(2):
            here = shard_span(
                span.map(lambda x, r=row: x[r : r + 1]),
                [layout("zigzag", span.shape[1], size)],
                rank,
            )
            mine = (
                here.sharding.shard(tokens[row : row + 1], 0),
                here.sharding.shard(targets[row : row + 1], IGNORE),
            )
            engine.backward(
                engine.model(MicroBatch(mine[0], here, mine[1])).sum() / valid, last=row == 1
            )
        norms.append(engine.clip(0.1))
        engine.step(0.01)
    state = engine.state()["model"].items()
    whole = {key: t.full_tensor() if isinstance(t, DTensor) else t.clone() for key, t in state}
    return norms, whole, communicator and sum(communicator.bytes_sent.values())


def with_and_without(env, name, method, grid, settings):
    """Bytes that left for the host, once both ways have given the same."""
    offload, found = to_host(), []
    for each in (offload, None):
        with torch.device("meta"):
            model = decoder()
        engine = ENGINES[name](
            build_mesh(env.size, 1, **grid), AdamW(learning_rate=1e-2), seed=5, **settings
        )
        found.append(trained(engine, model, each, method, env.rank, env.size))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    return offload.sent


@pytest.mark.short("ring-3-grid0-none", "allgather-3-grid4-selective")
@pytest.mark.parametrize(
    "method, size, grid, checkpointing",
    [
        ("ring", 3, {}, "none"),
        *(pytest.param("ring", 3, {}, way, marks=pytest.mark.full) for way in WAYS[1:]),
        ("ulysses", 3, {}, "none"),
        ("allgather", 3, {}, "selective"),
        ("usp", 2, {"ulysses": 1, "ring": 2}, "selective"),
    ],
)
def test_exchanges_and_engines_are_the_same_bits_and_gathered_parameters_stay(
    method, size, grid, checkpointing
):
    settings = {"precision": "float64", "checkpointing": checkpointing}
    left = {
        name: ranks(size, with_and_without, name, method, grid, settings)
        for name in ("single", "fsdp")
    }
    assert min(left["single"]) > 0
    assert left["fsdp"] == left["single"], (
        "a parameter that was gathered for a block went to the host"
    )


@pytest.mark.short("fsdp-bfloat16")
@pytest.mark.parametrize(
    "name, precision",
    [
        ("fsdp", "bfloat16"),
        pytest.param("zero1", "float32", marks=pytest.mark.full),
        ("zero3", "float32"),
        pytest.param("zero3", "bfloat16", marks=pytest.mark.full),
    ],
)
def test_other_precisions_and_engines(name, precision):
    left = [
        ranks(2, with_and_without, each, "ring", {}, {"precision": precision})
        for each in (name, "single")
    ]
    assert left[0] == left[1]


def experts(env, name, checkpointing):
    """As with_and_without, of a model with experts over the ranks."""
    offload, found = to_host(), []
    shape = {"context": 2, "data": 2, "experts": 2, "replicas": 1}
    for each in (offload, None):
        engine = small_mixture.engine_here(name, shape, checkpointing=checkpointing, offload=each)
        found.append(small_mixture.train(engine, range(2)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    return offload.sent


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", ["none", pytest.param("full", marks=pytest.mark.full)])
def test_experts_that_are_gathered_inside_a_block_stay(checkpointing):
    left = {name: sorted(ranks(4, experts, name, checkpointing)) for name in ("single", "fsdp")}
    assert left["fsdp"] == left["single"] and left["single"][0] > 0


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_compiled_blocks_are_the_same_bits(checkpointing):
    offload, found = to_host(), []
    for each in (offload, None):
        engine = Single(Mesh.alone(), AdamW(), checkpointing=checkpointing, compile=True)
        found.append(trained(engine, initialise(decoder(), seed=5), each))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert offload.sent > 0


def test_views_of_a_storage_travel_as_one_and_come_back_as_they_were():
    offload, base = to_host(), torch.randn(24, 64)
    views = [
        base,
        base.t(),
        base[3:, ::2],
        base.view(3, 8, 64).transpose(0, 1),
        base[:1].expand(5, 64),
    ]
    sent = [offload.send(view, nn.Module()) for view in views]
    assert offload.sent == base.untyped_storage().nbytes() and len(offload.copies) == 1
    expected, size = [view.clone() for view in views], base.nbytes
    strides = [view.stride() for view in views]
    del base, views
    back = [offload.fetch(each) for each in sent]
    assert [each.stride() for each in back] == strides
    torch.testing.assert_close(back, expected, rtol=0, atol=0)
    assert len({each.untyped_storage().data_ptr() for each in back}) == 1, (
        f"{size} bytes come back once"
    )


def test_what_was_written_to_since_is_something_else():
    offload, x = to_host(), torch.zeros(512)
    before = offload.send(x, nn.Module())
    x.add_(1)
    after = offload.send(x, nn.Module())
    assert offload.fetch(before).sum() == 0 and offload.fetch(after).sum() == 512


def test_another_tensor_at_the_same_place_is_not_taken_for_the_first():
    offload, sent = to_host(), []
    for value in range(
        20
    ):  # each is dropped before the next is made, which may get its memory and its name
        sent.append(offload.send(torch.full((512,), float(value)), nn.Module()))
    assert [offload.fetch(each)[0].item() for each in sent] == [*range(20)]


@pytest.mark.parametrize(
    "mark", [torch.conj, lambda z: z.conj().imag], ids=["conjugate", "negative"]
)
def test_marks_on_a_view_are_kept(mark):
    offload, z = to_host(), torch.randn(200, dtype=torch.complex64)
    assert mark(z).is_conj() or mark(z).is_neg()
    torch.testing.assert_close(
        offload.fetch(offload.send(mark(z), nn.Module())), mark(z), rtol=0, atol=0
    )


def test_parameters_buffers_small_things_and_what_lies_elsewhere_stay():
    offload, block = to_host(), nn.Linear(32, 32)
    block.register_buffer("table", table := torch.zeros(512))
    stay = [block.weight, block.weight.t(), block.weight.detach()[1:], table, table.view(2, 256)]
    stay += [
        torch.zeros(SMALL // 4 - 1),
        torch.empty(9999, device="meta"),
        torch.eye(100).to_sparse(),
    ]
    assert (
        all(isinstance(offload.send(each, block), torch.Tensor) for each in stay)
        and offload.sent == 0
    )
    assert (
        offload.send(block.weight, block) is block.weight
    )  # DeepSpeed gathers it again under its name
    offload.send(torch.zeros(SMALL // 4), block)
    assert offload.sent == SMALL


class Exponential(torch.autograd.Function):
    """Saves its result. graphs: what lives as long as the graph does."""

    graphs = weakref.WeakSet()

    @staticmethod
    def forward(ctx, x):
        ctx.what = torch.nn.Identity()
        Exponential.graphs.add(ctx.what)
        ctx.save_for_backward(y := x.exp())
        return y

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        return grad * ctx.saved_tensors[0]


@pytest.mark.parametrize("size", [SMALL // 16, SMALL])
def test_a_graph_that_nobody_goes_back_through_is_freed(size):
    offload, x = to_host(), torch.zeros(size, requires_grad=True)
    with saved_tensors_hooks(lambda t: offload.send(t, nn.Module()), offload.fetch):
        result = Exponential.apply(x).exp()
    assert len(Exponential.graphs) == 1
    del result
    gc.collect()
    assert not Exponential.graphs and not offload.copies


def test_a_backward_may_be_repeated_and_differentiated_again():
    def gradients(hooks):
        x = torch.linspace(-1, 1, 512, dtype=torch.float64).requires_grad_()
        with hooks:
            y = (x.exp() * x.tanh()).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        return (
            first.detach(),
            torch.autograd.grad(first.square().sum(), x, retain_graph=True)[0],
            torch.autograd.grad(y, x)[0],
        )

    offload = to_host()
    found = gradients(saved_tensors_hooks(lambda t: offload.send(t, nn.Module()), offload.fetch))
    torch.testing.assert_close(
        found, gradients(saved_tensors_hooks(lambda t: t, lambda t: t)), rtol=0, atol=0
    )
    assert offload.sent > 0


def test_where_the_ranks_compute_on_the_host_there_is_nowhere_to_send_to():
    with pytest.raises(
        ValueError,
        match=r"engine.offload_activations=true, but .* engine.offload_activations=false",
    ):
        ActivationOffload(CPU)


@pytest.mark.full
def test_the_bench_compares_a_step_with_itself():
    rows = [
        *measure(
            CPU,
            "float32",
            OffloadSizes(tokens=256, width=64, layers=3),
            lambda device: ActivationOffload(device, aside),
        )
    ]
    assert [row["checkpointing"] for row in rows] == WAYS and all(row["exact"] for row in rows)
    for row in rows:
        assert row["sent_bytes"] == pytest.approx(row["predicted_sent_bytes"], rel=0.01)
        assert row["predicted_offloaded_peak_bytes"] < row["predicted_peak_bytes"]
