"""Structured attention against the public implementations in transformers: random weights, outputs
and gradients."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.models.big_bird.configuration_big_bird import BigBirdConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Attention,
    DeepseekV4RotaryEmbedding,
)
from transformers.models.longformer.configuration_longformer import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from models.attention.bigbird import BigBird
from models.attention.compressed import Compressed
from models.attention.latent import LatentAttention
from models.attention.longformer import Longformer
from models.positions.none import NoPosition
from models.positions.rope import Rope
from models.scores import Score
from models.span import GLOBAL, Span

ROWS, TOKENS, WIDTH = 2, 24, 32
FUTURE = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)


def _fill(module: nn.Module) -> nn.Module:
    """Random weights of order one over the root of the width, norms near one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        size = parameter.shape[-1] if parameter.dim() > 1 else 16
        parameter.data = torch.randn(parameter.shape, generator=generator) / size**0.5 + (
            parameter.dim() == 1
        )
    return module


def _same(ours: nn.Module, theirs, span: Span, x: Tensor, pairs: dict[str, Tensor]) -> None:
    """Outputs, the input's gradient, and the gradients of named parameters (`pairs`: ours ->
    theirs, as gradients)."""
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = ours(a, span), theirs(b)
    _close(got, want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    _close(a.grad, b.grad)
    for name, find in pairs.items():
        _close(ours.get_parameter(name).grad, find())


def _close(got: Tensor, want: Tensor) -> None:
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error < 1e-5, error


def _unweave(width: int) -> Tensor:
    """Order of channels that turns pairs (2i, 2i + 1) into pairs (i, i + width / 2)."""
    return torch.arange(width).view(-1, 2).T.flatten()


def test_latent_attention_is_deepseek_v3():
    heads, content, turned, value, latent = 4, 8, 6, 5, 12
    config = DeepseekV3Config(
        hidden_size=WIDTH,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=10,
        kv_lora_rank=latent,
        qk_nope_head_dim=content,
        qk_rope_head_dim=turned,
        v_head_dim=value,
        max_position_embeddings=64,
        rope_interleave=True,
        attention_bias=False,
        attn_implementation="eager",
    )
    theirs = _fill(DeepseekV3Attention(config, 0))
    position = DeepseekV3RotaryEmbedding(config)
    ours = LatentAttention(
        WIDTH,
        heads,
        Rope(config.rope_parameters["rope_theta"]),
        kv_latent=latent,
        q_latent=10,
        nope_dim=content,
        rope_dim=turned,
        value_dim=value,
    )
    rows = torch.cat([torch.arange(content), content + _unweave(turned)])
    q_order = torch.cat([h * (content + turned) + rows for h in range(heads)])
    kv_order = torch.cat([torch.arange(latent), latent + _unweave(turned)])
    ours.squeeze_q.weight.data = theirs.q_a_proj.weight.data.clone()
    ours.norm_q.weight.data = theirs.q_a_layernorm.weight.data.clone()
    ours.q.weight.data = theirs.q_b_proj.weight.data[q_order]
    ours.squeeze.weight.data = theirs.kv_a_proj_with_mqa.weight.data[kv_order]
    ours.norm.weight.data = theirs.kv_a_layernorm.weight.data.clone()
    ours.up.weight.data = theirs.kv_b_proj.weight.data.clone()
    ours.out.weight.data = theirs.o_proj.weight.data.clone()
    mask = torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(FUTURE, -torch.inf)
    span = Span.line(ROWS, TOKENS)

    def call(x: Tensor) -> Tensor:
        return theirs(x, position(x, span.pos), mask)[0]

    _same(
        ours,
        call,
        span,
        torch.randn(ROWS, TOKENS, WIDTH),
        {
            "q.weight": lambda: theirs.q_b_proj.weight.grad[q_order],
            "squeeze.weight": lambda: theirs.kv_a_proj_with_mqa.weight.grad[kv_order],
            "norm.weight": lambda: theirs.kv_a_layernorm.weight.grad,
            "up.weight": lambda: theirs.kv_b_proj.weight.grad,
            "out.weight": lambda: theirs.o_proj.weight.grad,
        },
    )


def _identity_out(ours: nn.Module) -> None:
    """Their attention ends before the output projection."""
    ours.out.weight.data = torch.eye(WIDTH)


def test_longformer_is_transformers_longformer():
    window = 6
    config = LongformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        attention_window=[window],
        num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=TOKENS,
    )
    theirs = _fill(LongformerSelfAttention(config, 0)).eval()
    ours = Longformer(
        WIDTH, 4, 4, NoPosition(), 0, 1, window=window // 2 + 1, first=0, symmetric=True
    )
    _identity_out(ours)
    for name in ("query", "key", "value"):
        for kind, mine in (("", name[0]), ("_global", f"global_{name[0]}")):
            linear = getattr(theirs, name + kind)
            linear.bias.data.zero_()
            getattr(ours, mine).weight.data = linear.weight.data.clone()
    important = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    important[0, [0, 13]], important[1, 5] = True, True
    line = Span.line(ROWS, TOKENS)
    span = Span(line.pos, line.doc, torch.where(important, GLOBAL, 0))

    def call(x: Tensor) -> Tensor:
        mask = important.float() * 10_000
        masked = torch.zeros_like(important)
        return theirs(
            x, mask, is_index_masked=masked, is_index_global_attn=important, is_global_attn=True
        )[0]

    pairs = {
        "q": "query",
        "k": "key",
        "v": "value",
        "global_q": "query_global",
        "global_v": "value_global",
    }
    grads = {f"{a}.weight": lambda b=b: getattr(theirs, b).weight.grad for a, b in pairs.items()}
    _same(ours, call, span, torch.randn(ROWS, TOKENS, WIDTH), grads)


class _Repeated(Score):
    """Their evaluation takes block 0 for every random block and so counts it 1 + random times."""

    def __init__(self, block: int, random: int, blocks: int):
        super().__init__()
        self.block, self.random, self.blocks = block, random, blocks

    def bias(self, span, kv_span, heads, dtype):
        middle = (span.pos >= self.block) & (span.pos < (self.blocks - 1) * self.block)
        again = middle[:, :, None] & (kv_span.pos < self.block)[:, None, :]
        return (again * math.log(1 + self.random)).to(dtype)[:, None]


def test_bigbird_is_transformers_bigbird():
    block, blocks, random = 4, 9, 2
    config = BigBirdConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        block_size=block,
        num_random_blocks=random,
        use_bias=False,
        max_position_embeddings=block * blocks,
    )
    theirs = _fill(BigBirdBlockSparseAttention(config)).eval()
    ours = BigBird(
        WIDTH, 4, 4, NoPosition(), 0, 0, block=block, window=1, first=1, random=0, symmetric=True
    )
    ours.mix.score = _Repeated(block, random, blocks)
    _identity_out(ours)
    for name in ("query", "key", "value"):
        getattr(ours, name[0]).weight.data = getattr(theirs, name).weight.data.clone()
    line = Span.line(ROWS, block * blocks)
    last = line.pos >= block * (blocks - 1)  # their last block is global too
    span = Span(line.pos, line.doc, torch.where(last, GLOBAL, 0))
    blocked, band, rows, keys = BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(last.shape), block
    )

    def call(x: Tensor) -> Tensor:
        return theirs(x, band, rows, keys, blocked, blocked)[0]

    grads = {
        f"{n[0]}.weight": lambda n=n: getattr(theirs, n).weight.grad
        for n in ("query", "key", "value")
    }
    _same(ours, call, span, torch.randn(ROWS, block * blocks, WIDTH), grads)


def _compressed_pair(top: int) -> tuple[Compressed, nn.Module, nn.Module, dict[str, Tensor]]:
    """Ours and theirs with the same weights, their positions, and the orders of channels that turn
    ours into theirs."""
    heads, channels, turned, index_channels = 4, 12, 4, 8
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": turned / channels}
    config = DeepseekV4Config(
        hidden_size=WIDTH,
        num_attention_heads=heads,
        head_dim=channels,
        q_lora_rank=10,
        num_hidden_layers=1,
        layer_types=["compressed_sparse_attention"],
        mlp_layer_types=["moe"],
        sliding_window=5,
        o_groups=2,
        o_lora_rank=7,
        compress_rates={"compressed_sparse_attention": 3, "heavily_compressed_attention": 8},
        index_n_heads=3,
        index_head_dim=index_channels,
        index_topk=top,
        rope_parameters={"main": dict(rope), "compress": dict(rope)},
        partial_rotary_factor=turned / channels,
        attn_implementation="eager",
    )
    theirs = _fill(DeepseekV4Attention(config, 0))
    ours = Compressed(
        WIDTH,
        heads,
        Rope(100.0),
        channels=channels,
        rope_dim=turned,
        q_latent=10,
        block=3,
        top=top,
        window=5,
        index_heads=3,
        index_channels=index_channels,
        groups=2,
        group_width=7,
    )

    def order(width: int, times: int) -> Tensor:
        one = torch.cat([torch.arange(width - turned), width - turned + _unweave(turned)])
        return torch.cat([i * width + one for i in range(times)])

    orders = {
        "q": order(channels, heads),
        "kv": order(channels, 1),
        "pair": order(channels, 2),
        "group": order(channels, 2),
    }
    orders |= {
        "index": order(index_channels, 1),
        "index_pair": order(index_channels, 2),
        "index_q": order(index_channels, 3),
    }
    press, index = theirs.compressor, theirs.compressor.indexer
    ours.squeeze_q.weight.data = theirs.q_a_proj.weight.data.clone()
    ours.norm_q.weight.data = theirs.q_a_norm.weight.data.clone()
    ours.q.weight.data = theirs.q_b_proj.weight.data[orders["q"]]
    ours.kv.weight.data, ours.norm.weight.data = (
        theirs.kv_proj.weight.data[orders["kv"]],
        theirs.kv_norm.weight.data[orders["kv"]],
    )
    for mine, their, pair, one in (
        (ours.compressor, press, "pair", "kv"),
        (ours.indexer.compressor, index, "index_pair", "index"),
    ):
        mine.value.weight.data = their.kv_proj.weight.data[orders[pair]]
        mine.gate.weight.data = their.gate_proj.weight.data[orders[pair]]
        mine.bias.data = their.position_bias.data[:, orders[pair]]
        mine.norm.weight.data = their.kv_norm.weight.data[orders[one]]
    ours.indexer.q.weight.data = index.q_b_proj.weight.data[orders["index_q"]]
    ours.indexer.weight.weight.data = index.scorer.weights_proj.weight.data.clone()
    ours.sink.data = theirs.sinks.data.clone()
    ours.group.data = theirs.o_a_proj.weight.data.view(2, 7, -1)[..., orders["group"]]
    ours.out.weight.data = theirs.o_b_proj.weight.data.clone()
    return ours, theirs, DeepseekV4RotaryEmbedding(config), orders


@pytest.mark.parametrize("top", [2, 100])
def test_compressed_attention_is_deepseek_v4(top):
    ours, theirs, position, orders = _compressed_pair(top)
    far = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(-5)
    mask = torch.zeros(ROWS, 1, TOKENS, TOKENS).masked_fill(FUTURE | far, -torch.inf)
    span = Span.line(ROWS, TOKENS)

    def call(x: Tensor) -> Tensor:
        turns = {kind: position(x, span.pos, layer_type=kind) for kind in ("main", "compress")}
        return theirs(x, turns, span.pos, mask)[0]

    press = theirs.compressor
    _same(
        ours,
        call,
        span,
        torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3)),
        {
            "q.weight": lambda: theirs.q_b_proj.weight.grad[orders["q"]],
            "kv.weight": lambda: theirs.kv_proj.weight.grad[orders["kv"]],
            "compressor.value.weight": lambda: press.kv_proj.weight.grad[orders["pair"]],
            "compressor.gate.weight": lambda: press.gate_proj.weight.grad[orders["pair"]],
            "compressor.bias": lambda: press.position_bias.grad[:, orders["pair"]],
            "sink": lambda: theirs.sinks.grad,
            "out.weight": lambda: theirs.o_b_proj.weight.grad,
        },
    )
