"""Our layers against those of transformers: the same random weights, the same outputs and gradients
in float32."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DiffLlamaConfig,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    T5Config,
    XLNetConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.xlnet.modeling_xlnet import XLNetModel, XLNetRelativeAttention

from models.attention.bidirectional import Bidirectional
from models.attention.differential import LAMBDAS, Differential
from models.attention.full import Attention
from models.attention.qk_norm import QKNorm
from models.attention.sink_logit import SinkLogit
from models.attention.sliding import Sliding
from models.attention.softcap import Softcap
from models.positions.alibi import Alibi, AlibiScore
from models.positions.interpolated import Interpolated
from models.positions.ntk import Ntk
from models.positions.relative import Relative
from models.positions.rope import Rope
from models.positions.t5 import T5
from models.positions.yarn import Yarn
from models.span import Span

WIDTH, HEADS, KV, TOKENS = 64, 4, 2, 37
SIZES = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": WIDTH // HEADS,
    "attn_implementation": "eager",
    "max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}


def mask(reach: int = TOKENS) -> Tensor:
    """[1, 1, T, T]: 0 where a key is among the last `reach`, hugely negative elsewhere."""
    apart = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)[None]
    return torch.zeros(TOKENS, TOKENS).masked_fill(
        (apart < 0) | (apart >= reach), torch.finfo(torch.float32).min
    )[None, None]


def randomise(module: nn.Module, seed: int = 3) -> nn.Module:
    """Every parameter normal: nothing rests at a value that hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (
            0.2 if parameter.dim() > 1 else 0.7
        )
    return module


def copy(theirs: nn.Module, ours: nn.Module, names: dict[str, str]) -> None:
    """Set our parameters to theirs; `names` maps ours to theirs, and must name all of ours."""
    found = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(names)
    for mine, his in names.items():
        ours.get_parameter(mine).data = found[his].data.clone()


LLAMA = {
    "q.weight": "q_proj.weight",
    "k.weight": "k_proj.weight",
    "v.weight": "v_proj.weight",
    "out.weight": "o_proj.weight",
}


def closeness(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def compare(theirs, ours, names: dict[str, str], call) -> float:
    """Worst relative difference of the output, the input's gradient and every parameter's
    gradient."""
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(5))
    weight = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(6))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    want, got = call(inputs[0]), ours(inputs[1], Span.line(2, TOKENS))
    for out in (want, got):
        (out * weight).sum().backward()
    grads = dict(theirs.named_parameters())
    pairs = [(got, want), (inputs[1].grad, inputs[0].grad)]
    pairs += [(p.grad, grads[names[name]].grad) for name, p in ours.named_parameters()]
    return max(closeness(a.detach(), b.detach()) for a, b in pairs)


def check(
    theirs,
    ours,
    config,
    names: dict[str, str] = LLAMA,
    reach: int = TOKENS,
    turns=LlamaRotaryEmbedding,
) -> None:
    """A rotary layer of theirs against ours."""
    randomise(theirs)
    copy(theirs, ours, names)
    rotary = turns(config)
    where = torch.arange(TOKENS)[None]
    assert (
        compare(theirs, ours, names, lambda x: theirs(x, rotary(x, where), mask(reach))[0]) < 1e-5
    )


def test_llama_with_shared_key_heads():
    config = LlamaConfig(**SIZES)
    check(LlamaAttention(config, 0), Attention(WIDTH, HEADS, KV, Rope()), config)


def test_llama_with_yarn():
    config = LlamaConfig(**SIZES, rope_parameters=YARN)
    check(LlamaAttention(config, 0), Attention(WIDTH, HEADS, KV, Yarn(4.0, 16)), config)


def test_mistrals_window():
    config = MistralConfig(**SIZES, sliding_window=9)
    check(MistralAttention(config, 0), Sliding(WIDTH, HEADS, KV, Rope(), window=9), config, reach=9)


def test_gpt_oss_sink_logit():
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    config = GptOssConfig(
        **SIZES,
        num_hidden_layers=1,
        sliding_window=9,
        layer_types=["sliding_attention"],
        attention_bias=False,
        rope_parameters=rope,
    )
    ours = SinkLogit(WIDTH, HEADS, KV, Rope(), window=9)
    names = {**LLAMA, "tables.logit": "sinks"}
    check(GptOssAttention(config, 0), ours, config, names, reach=9, turns=GptOssRotaryEmbedding)


def test_qwen3_normed_queries_and_keys():
    config = Qwen3Config(**SIZES)
    names = {**LLAMA, "q_norm.weight": "q_norm.weight", "k_norm.weight": "k_norm.weight"}
    check(
        Qwen3Attention(config, 0),
        QKNorm(WIDTH, HEADS, KV, Rope(), eps=config.rms_norm_eps),
        config,
        names,
    )


def test_gemma2_soft_cap():
    config = Gemma2Config(**SIZES, attn_logit_softcapping=3.0, query_pre_attn_scalar=WIDTH // HEADS)
    check(Gemma2Attention(config, 1), Softcap(WIDTH, HEADS, KV, Rope(), cap=3.0), config)


@pytest.mark.parametrize("kv_heads", [2, 4, 8])
def test_diffllama(kv_heads):
    """Their heads lie (2, G, r) and halves of a value head lie G heads apart; ours lie (G, 2, r)
    and (G, 2).

    Lambda's gradient is one sum over everything; seed 4 is one where its terms do not happen to
    cancel.
    """
    heads = 8
    config = DiffLlamaConfig(
        **{
            **SIZES,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": WIDTH // heads,
        }
    )
    config.rms_norm_eps = 1e-5
    theirs, ours = (
        randomise(DiffLlamaAttention(config, 2), seed=4),
        Differential(WIDTH, heads, kv_heads, Rope(), layer=2),
    )
    for name in LAMBDAS:
        theirs.get_parameter(name).data *= 0.3  # lambda of about 1
    theirs.groupnorm.weight = nn.Parameter(
        torch.ones(2 * WIDTH // heads)
    )  # theirs has none; RMSNorm takes it if it is there
    names = {**LLAMA, **{name: name for name in LAMBDAS}, "norm.weight": "groupnorm.weight"}
    copy(theirs, ours, names)
    groups = kv_heads // 2
    order = {
        "q.weight": (2, groups, heads // kv_heads),
        "k.weight": (2, groups, 1),
        "v.weight": (2, groups, 1),
    }

    def reorder(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        return weight.unflatten(0, (*shape, WIDTH // heads)).transpose(0, 1).reshape(weight.shape)

    for name, shape in order.items():
        ours.get_parameter(name).data = reorder(ours.get_parameter(name).data, shape)
    for name, shape in order.items():  # so that gradients come out in their order
        inverse = reorder(torch.arange(ours.get_parameter(name).shape[0])[:, None], shape)[
            :, 0
        ].argsort()
        ours.get_parameter(name).register_post_accumulate_grad_hook(
            lambda p, i=inverse: setattr(p, "grad", p.grad[i])
        )
    rotary, where = LlamaRotaryEmbedding(config), torch.arange(TOKENS)[None]
    assert compare(theirs, ours, names, lambda x: theirs(x, rotary(x, where), mask())[0]) < 1e-5


T5_NAMES = {
    "q.weight": "q.weight",
    "k.weight": "k.weight",
    "v.weight": "v.weight",
    "out.weight": "o.weight",
    "tables.table": "relative_attention_bias.weight",
}


@pytest.mark.parametrize("decoder", [True, False])
def test_t5_buckets(decoder):
    config = T5Config(
        d_model=WIDTH, num_heads=HEADS, d_kv=WIDTH // HEADS, is_decoder=decoder, dropout_rate=0.0
    )
    config.relative_attention_num_buckets, config.relative_attention_max_distance = 12, 24
    theirs = randomise(T5Attention(config, has_relative_attention_bias=True, layer_idx=0))
    kind = Attention if decoder else Bidirectional
    ours = kind(WIDTH, HEADS, HEADS, T5(12, 24, bidirectional=not decoder, scale=1.0))
    copy(theirs, ours, T5_NAMES)
    seen = mask() if decoder else torch.zeros(1, 1, TOKENS, TOKENS)
    assert compare(theirs, ours, T5_NAMES, lambda x: theirs(x, mask=seen)[0]) < 1e-5


@pytest.mark.parametrize("both", [False, True])
def test_t5_far_distances_fall_into_their_buckets(both):
    span, kv_span = Span.of(torch.tensor([[3000]]), torch.tensor([[0]])), Span.line(1, 6000)
    want = T5Attention._relative_position_bucket(
        kv_span.pos - 3000, bidirectional=both, num_buckets=32, max_distance=128
    )
    assert torch.equal(T5(bidirectional=both).score(1, 1)[0].bucket(span, kv_span)[:, 0], want)


XLNET = {"q.weight": "q", "k.weight": "k", "v.weight": "v", "out.weight": "o"}


def test_xlnet_relative_scores():
    """XLNet's one-way attention is Transformer-XL's: u, v and the projected sinusoid; only the core
    is called."""
    config = XLNetConfig(
        d_model=WIDTH,
        n_head=HEADS,
        d_inner=8,
        n_layer=1,
        dropout=0.0,
        attn_type="uni",
        vocab_size=8,
    )
    theirs = randomise(XLNetRelativeAttention(config))
    ours = Attention(WIDTH, HEADS, HEADS, Relative())
    for mine, his in XLNET.items():
        weight = theirs.get_parameter(his).data.flatten(1)
        ours.get_parameter(mine).data = (weight if mine == "out.weight" else weight.T).clone()
    ours.tables.u.data, ours.tables.v.data = (
        theirs.r_w_bias.data.clone(),
        theirs.r_r_bias.data.clone(),
    )
    ours.tables.distance.data = theirs.r.data.permute(1, 2, 0).clone()
    r = XLNetModel(config).relative_positional_encoding(TOKENS, TOKENS)

    def call(x: Tensor) -> Tensor:
        h, seen = x.transpose(0, 1), mask()[0, 0, :, :, None, None] < 0
        projected = (h, theirs.q), (h, theirs.k), (h, theirs.v), (r, theirs.r)
        heads = (torch.einsum("tbw,whd->tbhd", a, table) for a, table in projected)
        found = theirs.rel_attn_core(*heads, attn_mask=seen.float())
        return torch.einsum("tbhd,whd->btw", found, theirs.o)

    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(5))
    weight = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(6))
    want, got = call(x), ours(x, Span.line(2, TOKENS))
    (want * weight).sum().backward()
    (got * weight).sum().backward()
    assert closeness(got.detach(), want.detach()) < 1e-5
    tables = ours.tables
    pairs = [(tables.u.grad, theirs.r_w_bias.grad), (tables.v.grad, theirs.r_r_bias.grad)]
    pairs += [
        (tables.distance.grad, theirs.r.grad.permute(1, 2, 0)),
        (ours.q.weight.grad, theirs.q.grad.flatten(1).T),
    ]
    pairs += [
        (ours.k.weight.grad, theirs.k.grad.flatten(1).T),
        (ours.v.weight.grad, theirs.v.grad.flatten(1).T),
    ]
    assert max(closeness(a, b) for a, b in pairs) < 1e-5


@pytest.mark.parametrize(
    ("kind", "ours", "settings"),
    [
        ("yarn", Yarn(4.0, 512), {"original_max_position_embeddings": 512}),
        (
            "yarn",
            Yarn(40.0, 4096, beta_fast=20, beta_slow=2),
            {"original_max_position_embeddings": 4096, "beta_fast": 20, "beta_slow": 2},
        ),
        ("yarn", Yarn(2.0, 7), {"original_max_position_embeddings": 7}),
        (
            "yarn",
            Yarn(8.0, 512, attention_factor=1.0),
            {"original_max_position_embeddings": 512, "attention_factor": 1.0},
        ),
        ("linear", Interpolated(3.0), {}),
        ("dynamic", Ntk(2.0, original_length=512, context_length=2048), {}),
    ],
)
def test_speeds_of_scaled_rotary_positions(kind, ours, settings):
    factor = getattr(ours, "factor", 2.0)
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": factor, **settings}
    config = LlamaConfig(
        **{**SIZES, "head_dim": 64, "max_position_embeddings": 512}, rope_parameters=rope
    )
    want, magnitude = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=2048)
    got = ours.inv_freq(64, torch.device("cpu"), torch.float64)
    assert ((got - want).abs() / want).max() < 1e-6
    assert getattr(ours, "attention_factor", 1.0) == pytest.approx(magnitude)


@pytest.mark.parametrize("heads", [1, 3, 8, 12, 20])
def test_bloom_slopes(heads):
    score = Alibi().score(heads, 4)[0]
    assert isinstance(score, AlibiScore)
    span = Span.line(1, TOKENS)
    got = score.bias(span, span, torch.arange(heads), torch.float32)
    want = build_alibi_tensor(torch.ones(1, TOKENS), heads, torch.float32).view(1, heads, 1, TOKENS)
    seen = mask()[0, 0] == 0
    apart = (got - want)[:, :, seen] - (got - want).diagonal(dim1=2, dim2=3).repeat_interleave(
        seen.sum(1), 2
    )
    assert apart.abs().max() < 1e-5
