"""Tiles of tokens train what all tokens at once train, and hold no more however many there are."""

import copy
import functools

import pytest
import torch

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.block import Block
from models.feedforward import FeedForward, NoFeedForward, SwiGLU
from models.init import initialise
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.moe.topk import TopKMixture
from models.positions.rope import Rope
from models.recurrent.rwkv_layers import ChannelMix
from models.span import Span
from parallel.engines.fsdp import Fsdp
from parallel.engines.single import Single
from parallel.layout import layout
from parallel.mesh import Mesh, build_mesh
from parallel.parallelize import parallelize
from parallel.sharding import shard_span
from parallel.tiles import apply_tiles, tile_count, tileable_blocks
from tests.support.live import Live
from tests.support.parity import packed
from tests.support.pool import ranks
from trainer.config.build_model import build_model
from trainer.config.compose import compose
from trainer.optim.adamw import AdamW
from trainer.placement import place

WORDS, WIDTH = 13, 24
ENGINES = {"single": Single, "fsdp": Fsdp}
OPTIM = AdamW(learning_rate=1e-2)


def decoder(norm_place="before") -> Decoder:
    mixers = [Attention(WIDTH, 2, 1, Rope()) for _ in range(3)]
    feedforwards = [SwiGLU(WIDTH, 40), FeedForward(WIDTH, 31), NoFeedForward()]
    return Decoder(
        WORDS,
        WIDTH,
        mixers,
        feedforwards,
        position=Rope(),
        norm_place=norm_place,
        logit_cap=5.0,
    )


def data():
    """([2, T] tokens, targets, span): documents of two rows, padding, some targets missing."""
    span = packed()
    draw = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(0, WORDS, span.shape, generator=draw) for _ in range(2))
    return tokens, targets.masked_fill(~span.valid() | (span.pos % 5 == 3), IGNORE), span


@functools.cache
def truth(norm_place):
    """(losses, gradients) of one process without tiles."""
    model = initialise(decoder(norm_place), seed=5).double()
    tokens, targets, span = data()
    losses = model(MicroBatch(tokens, span, targets))
    losses.sum().backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("tiles", [1, 3, 102, 200])
@pytest.mark.parametrize("norm_place", ["before", "both", "after"])
def test_tiles_give_the_same_losses_and_gradients(norm_place, tiles):
    losses, gradients = truth(norm_place)
    model = initialise(decoder(norm_place), seed=5).double()
    assert apply_tiles(model, tiles) == 2
    tokens, targets, span = data()
    batch = MicroBatch(tokens, span, targets)
    with torch.no_grad():
        torch.testing.assert_close(model(batch), losses, rtol=0, atol=1e-12)
    own = model(batch)
    own.sum().backward()
    torch.testing.assert_close(own.detach(), losses, rtol=0, atol=1e-12)
    found = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(found, gradients, rtol=0, atol=1e-12)


def placed(env, engine_name, checkpointing, policy):
    """(sum of this rank's losses, gradients) with tiles of tokens, and groups of heads where
    attention is computed again, over all ranks of a row."""
    engine = ENGINES[engine_name](
        build_mesh(env.size, 1),
        OPTIM,
        precision="float64",
        seed=5,
        checkpointing=checkpointing,
    )
    with torch.device("meta"):
        model = decoder()
    groups = None if checkpointing == "selective" else 2
    parallelize(model, engine, method="ring", tiles=4, head_groups=groups)
    engine.load_weights(initialise(decoder(), seed=5).double().named_parameters())
    tokens, targets, span = data()
    here = shard_span(span, [layout(policy, span.shape[1], env.size)], env.rank)
    batch = MicroBatch(here.sharding.shard(tokens, 0), here, here.sharding.shard(targets, IGNORE))
    loss = engine.model(batch).sum()
    engine.backward(loss)
    gradients = {}
    for name, parameter in engine.parameters.items():
        whole = getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)
        gradients[name] = whole().clone()
    return loss.detach(), gradients


@pytest.mark.parametrize(
    ("engine_name", "checkpointing", "policy"),
    [
        ("fsdp", "none", "zigzag"),
        ("fsdp", "full", "contiguous"),
        ("fsdp", "selective", "zigzag"),
        ("single", "none", "zigzag"),
    ],
)
def test_ranks_that_share_a_row_train_in_tiles_what_one_trains(engine_name, checkpointing, policy):
    losses, gradients = truth("before")
    answers = ranks(3, placed, engine_name, checkpointing, policy)
    total = sum(loss for loss, _ in answers)
    torch.testing.assert_close(total, losses.sum(), rtol=0, atol=1e-12)
    for _, found in answers:
        torch.testing.assert_close(found, gradients, rtol=0, atol=1e-12)


def peak_beside_the_stream(tokens, tile_tokens):
    """Most bytes alive in forward and backward of a feed-forward layer, beyond [T, width]."""
    block = Block(WIDTH, NoFeedForward(), SwiGLU(WIDTH, 40 * WIDTH))
    model = torch.nn.ModuleList([block])
    if tile_tokens is not None:
        apply_tiles(model, tile_count(tokens, tile_tokens))
    for parameter in block.parameters():
        parameter.grad = torch.zeros_like(parameter)
    hidden = torch.zeros(1, tokens, WIDTH, requires_grad=True)
    span = Span.line(1, tokens)
    with Live() as live:
        block.transform(hidden, span).sum().backward()
    stream = tokens * WIDTH * hidden.element_size()
    return live.peak, stream


def test_the_peak_of_a_feedforward_layer_does_not_grow_with_the_tokens():
    few, few_stream = peak_beside_the_stream(256, 64)
    many, many_stream = peak_beside_the_stream(2048, 64)
    # The stream itself: tiles and their sum, and the gradients of both.
    assert many - few <= 4 * (many_stream - few_stream)
    whole, _ = peak_beside_the_stream(2048, None)
    assert whole > 100 * many_stream
    assert many < 0.1 * whole


def test_the_peak_of_a_norm_is_that_of_its_tokens():
    def peak(tiles):
        block = Block(WIDTH, NoFeedForward(), SwiGLU(WIDTH, WIDTH))
        if tiles is not None:
            apply_tiles(torch.nn.ModuleList([block]), tiles)
        block.mixer_norm.weight.grad = torch.zeros_like(block.mixer_norm.weight)
        hidden = torch.zeros(1, 4096, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        with Live() as live:
            block.mixer_norm(hidden).sum().backward()
        return live.peak / (hidden.numel() * hidden.element_size())

    # Wide and several times over: unless it is computed for a few tokens at a time.
    assert peak(None) > 8
    assert peak(64) < 5


def test_the_peak_of_the_losses_does_not_grow_with_the_tokens():
    def kept(tokens, tiles):
        model = initialise(decoder(), seed=5)
        if tiles:
            apply_tiles(model, tile_count(tokens, 64))
        hidden = torch.ones(1, tokens, WIDTH, requires_grad=True)
        targets = torch.zeros(1, tokens, dtype=torch.long)
        sizes = {}  # of each storage once: tiles save views of the same targets

        def keep(tensor):
            # What is only a view of the stream takes no memory of its own.
            storage = tensor.untyped_storage()
            if storage.data_ptr() != hidden.untyped_storage().data_ptr():
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.losses_of(hidden, targets)
        return sum(sizes.values())

    stream = WIDTH * 4
    # 8 bytes of a target for each token, which are there anyway.
    assert kept(2048, tiles=True) - kept(256, tiles=True) <= 8 * (2048 - 256)
    assert kept(2048, tiles=False) - kept(256, tiles=False) >= stream * (2048 - 256)


def test_layers_that_read_several_tokens_or_keep_sums_are_left_whole():
    for feedforward in (
        ChannelMix(WIDTH, 32, layer=0, layers=1),
        TopKMixture(WIDTH, 32, experts=4),
        NoFeedForward(),
    ):
        model = torch.nn.ModuleList([Block(WIDTH, NoFeedForward(), feedforward)])
        assert list(tileable_blocks(model)) == []
        assert apply_tiles(model, 4) == 0


def test_a_copy_of_a_tiled_model_computes_with_its_own_weights():
    model = initialise(decoder(), seed=5).double()
    apply_tiles(model, 4)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    tokens, targets, span = data()
    engine = Single(Mesh.alone(), OPTIM, precision="float64")
    engine.wrap(twin)
    losses = twin(MicroBatch(tokens, span, targets))
    valid = targets != IGNORE
    expected = torch.tensor(float(WORDS), dtype=torch.float64).log().expand_as(losses[valid])
    torch.testing.assert_close(losses[valid], expected)


@pytest.mark.parametrize(("words", "tiles"), [((), 8), (("parallel.micro_batch=1",), 4)])
def test_the_number_of_tiles_follows_from_the_config(words, tiles):
    sizes = ("model.width=16", "model.layers=1", "model.heads=2", "context_length=100")
    rows = ("batch_tokens=200", "engine.tile_tokens=25")
    config = compose([*sizes, *rows, *words]).config
    assert config is not None
    with torch.device("meta"):
        model = build_model(config, WORDS)
    placement = place(config, Mesh.alone(), model)
    # What engines take is unchanged; the two halves that are tiled know the number.
    assert placement.engine.model.blocks[0].transform.args[1] == tiles
    assert placement.engine.model.losses_of.args[1] == tiles
