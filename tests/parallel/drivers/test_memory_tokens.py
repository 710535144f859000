"""Recurrent memory over ranks: a decoder reads rows of lanes, and every output and gradient is that
of one device."""

import pytest
import torch
import torch.distributed as dist

from models.attention.full import Attention
from models.carried_state import CarriedState
from models.micro_batch import MicroBatch
from models.positions.rope import Rope
from models.primitives.segment_sum import SegmentSum
from models.primitives.softmax import Softmax
from parallel.carried_state import ShardedCarriedState
from parallel.collectives import Communicator
from parallel.context_parallel import apply_context_parallel, refusals
from parallel.drivers.sequential import Wavefront
from parallel.drivers.softmax_ring import Ring
from parallel.engines.fsdp import Fsdp
from parallel.engines.single import Single
from parallel.layout import layouts
from parallel.mesh import Mesh, build_mesh
from parallel.parallelize import parallelize
from parallel.sharding import shard_span
from tests.support.parity import EXACT, relative
from tests.support.pool import ranks
from tests.support.recurrent_decoder import decoder, lanes
from tests.variants import HEADS, WIDTH
from trainer.optim.adamw import AdamW


def read(model, past, move):
    """Losses of every row and all gradients; a step's gradients add up."""
    found = []
    for tokens, span, targets in lanes():
        tokens, span, targets = move(tokens, span, targets)
        losses = model(MicroBatch(tokens, past.attach(span), targets))
        losses.sum().backward()
        past.advance()
        found.append(losses.detach())
    return found


def compare(env, policy, dtype, mixer, settings):
    """Worst relative difference over three rows of two lanes."""
    one, past = decoder(mixer, dtype=dtype, **settings), CarriedState()
    want = read(one, past, lambda *row: row)
    many = decoder(mixer, dtype=dtype, **settings)
    names = list(many.state_dict())
    communicator = apply_context_parallel(many, env.group)
    assert list(many.state_dict()) == names and isinstance(many.memory.relay, Wavefront)
    shards = []

    def cut(tokens, span, targets):
        here = shard_span(span, layouts(policy, span, env.size), env.rank)
        shards.append(here.sharding.shard)
        return here.sharding.shard(tokens, 0), here, here.sharding.shard(targets, -100)

    dealt = ShardedCarriedState(communicator)
    got = read(many, dealt, cut)
    worst = {
        f"row {i}": relative(a, shard(b, 0))
        for i, (a, b, shard) in enumerate(zip(got, want, shards))
    }
    worst["memory"] = relative(dealt.states["memory"][1], past.states["memory"][1])
    for (name, a), (_, b) in zip(many.named_parameters(), one.named_parameters()):
        assert a.grad is not None, f"{name} has no gradient on rank {env.rank}"
        dist.all_reduce(a.grad, group=env.group)
        worst[name] = relative(a.grad, b.grad)
    return worst


CASES = [
    ("contiguous", 2, "full", {"segment": 6}),
    ("zigzag", 3, "full", {"segment": 6, "depth": 2}),
    ("balanced", 4, "full", {"segment": 6, "recompute": True}),
    ("zigzag", 2, "rwkv7", {"segment": 9, "depth": 1}),
    ("balanced", 3, "sliding", {"segment": None}),
    ("contiguous", 4, "gated_delta", {"segment": 20}),
    ("balanced", 2, "longformer", {"segment": 7, "depth": 3, "recompute": True}),
    ("contiguous", 3, "lsh", {"segment": 11}),
    ("zigzag", 4, "hyena", {"segment": 40}),
]


# Full attention, a window and a convolution.
FIRST = (1, 4, 8)


@pytest.mark.parametrize(
    "policy, size, mixer, settings",
    [
        case if number in FIRST else pytest.param(*case, marks=pytest.mark.full)
        for number, case in enumerate(CASES)
    ],
    ids=str,
)
def test_lanes_over_ranks_are_those_of_one_device(policy, size, mixer, settings):
    for dtype in EXACT:
        if mixer == "lsh" and dtype == torch.float32:
            continue  # hashes are compared in float64: rounding may turn one over
        for worst in ranks(size, compare, policy, dtype, mixer, settings):
            assert max(worst.values()) < EXACT[dtype], worst


ENGINES = {"single": Single, "fsdp": Fsdp}


def train(env, name, checkpointing):
    """Gradient norms of three steps over lanes, and the parameters after them, with all ranks
    sharing each row."""
    engine = ENGINES[name](
        build_mesh(env.size, 1),
        AdamW(learning_rate=1e-2),
        precision="float64",
        seed=1,
        checkpointing=checkpointing,
    )
    parallelize(decoder(segment=6), engine)
    dealt, norms = ShardedCarriedState(Communicator(env.group)), []
    for tokens, span, targets in lanes():
        here = dealt.attach(shard_span(span, layouts("zigzag", span, env.size), env.rank))
        shard = here.sharding.shard
        engine.backward(
            engine.model(MicroBatch(shard(tokens, 0), here, shard(targets, -100))).sum() / 100
        )
        dealt.advance()
        norms.append(engine.clip(1.0))
        engine.step(1e-2)
    return norms, {key: whole(p.detach()) for key, p in engine.parameters.items()}


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def truth():
    """The same in one process."""
    engine = Single(Mesh.alone(), AdamW(learning_rate=1e-2), precision="float64", seed=1)
    parallelize(decoder(segment=6), engine)
    past, norms = CarriedState(), []
    for tokens, span, targets in lanes():
        engine.backward(engine.model(MicroBatch(tokens, past.attach(span), targets)).sum() / 100)
        past.advance()
        norms.append(engine.clip(1.0))
        engine.step(1e-2)
    return norms, {key: p.detach() for key, p in engine.parameters.items()}


@pytest.mark.short("fsdp-full")
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("name", ["single", "fsdp"])
def test_a_run_is_the_same_on_every_engine(name, checkpointing):
    norms, parameters = truth()
    for found, trained in ranks(2, train, name, checkpointing):
        assert found == pytest.approx(norms, rel=1e-10)
        assert max(relative(p, parameters[key]) for key, p in trained.items()) < 1e-9


def kinds(env):
    """What stands in the decoder, and beside it, after spreading."""
    model = decoder(segment=6)
    model.beside = Attention(WIDTH, HEADS, 3, Rope())
    apply_context_parallel(model, env.group)
    return {type(block.mixer.mix) for block in model.blocks}, type(model.beside.mix)


def test_layers_inside_the_wavefront_are_not_spread_and_others_are():
    assert ranks(2, kinds) == [({Softmax}, Ring)] * 2


def test_a_layer_with_a_loss_of_its_own_is_refused_inside_the_wavefront():
    model = decoder(segment=6)
    assert refusals(model, "ulysses") == []
    model.blocks[1].feedforward.auxiliary, model.head.auxiliary = {}, {}
    model.blocks[1].feedforward.balance = SegmentSum()
    (said,) = refusals(model, "ring")
    assert said.startswith("blocks.1.feedforward (SwiGLU) leaves a loss of its own at each pass")
