"""Maps are the weights that a leaf's mean is made of: times the values they give its output, under
every mask and score."""

from functools import lru_cache

import pytest
import torch
from torch import nn

from models.analysis.attention_maps import attention_weights, collect, leaves
from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.feedforward import SwiGLU
from models.init import initialise
from models.memory.segments import SegmentMemory
from models.memory.tokens import MemoryTokens
from models.micro_batch import MicroBatch
from models.positions.rope import Rope
from models.primitives.softmax import Softmax
from models.span import Span
from tests.support.parity import build, given, packed, relative
from tests.variants import HEADS, VARIANTS, WIDTH, Taught


@lru_cache
def softmaxes() -> list[str]:
    """Rows of the table that have a softmax."""
    return [
        name for name in VARIANTS if any(isinstance(m, Softmax) for m in VARIANTS[name]().modules())
    ]


def made(name):
    """A mixer of the table, without the loss that is learned from only."""
    mixer = build(name)
    return mixer.inner if isinstance(mixer, Taught) else mixer


def calls(mixer, x, span):
    """(leaf, positional arguments, named arguments, output) of every call of a softmax."""
    found = []

    def note(leaf, args, kwargs, out):
        found.append((leaf, args, kwargs, out))

    for leaf in mixer.modules():
        if isinstance(leaf, Softmax):
            leaf.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        mixer(x, span)
    return found


@pytest.mark.parametrize("name", softmaxes())
def test_weights_times_values_are_the_mean_of_the_leaf(name):
    (x, _), span = given(torch.float64), packed()
    found = calls(made(name), x, span)
    assert found
    for leaf, args, kwargs, out in found:
        query, payload, params = (*args, ())[:3]
        got = attention_weights(leaf, *args, **kwargs)
        value = leaf.score.operands(query, payload, params)[2]
        value = value.repeat_interleave(got.shape[1] // value.shape[2], 2)
        live = span.valid()[..., None, None]
        assert relative(torch.einsum("bhts,bshe->bthe", got, value) * live, out * live) < 1e-12
        total, sink = got.sum(-1), leaf.score.sink(params)
        sees = got.amax(-1) > 0
        assert not got[~span.valid()[:, None].expand_as(sees)].any(), "padding sees nothing"
        if sink is None:
            assert (total - sees.to(total)).abs().max() < 1e-12
        else:
            assert (total <= 1).all() and (total[sees] > 0).all() and (total[sees] < 1).all()
        assert (got >= 0).all() and not got.isnan().any()


def test_the_share_of_a_sink_is_what_the_rows_lack():
    (x, _), span, mixer = given(torch.float64), packed(), build("sink_logit")
    one = calls(mixer, x, span)[0]
    sums = [attention_weights(one[0], *one[1], **one[2]).sum(-1)]
    with torch.no_grad():
        dict(mixer.named_parameters())["tables.logit"].add_(3)
    one = calls(mixer, x, span)[0]
    sums.append(attention_weights(one[0], *one[1], **one[2]).sum(-1))
    live = span.valid()[:, None].expand_as(sums[0])
    odds = [(1 - total[live]) / total[live] for total in sums]
    assert torch.allclose(odds[1], odds[0] * torch.e**3, rtol=1e-9)


class Model(nn.Module):
    """A mixer of the table as a model of one layer, fed with vectors instead of tokens."""

    def __init__(self, name: str):
        super().__init__()
        self.mixer = made(name)

    def forward(self, batch):
        return self.mixer(batch.tokens, batch.span)


def of(name, tokens=20):
    model, (x, _) = Model(name), given(torch.float64)
    return collect(model, leaves(model), x[:1, :tokens], packed().map(lambda t: t[:1, :tokens]))


def test_a_map_is_of_the_row_without_padding():
    model, (x, _), span = Model("full"), given(torch.float64), packed()
    padded = (span.doc[0] < 0).sum()
    (found,) = collect(model, leaves(model), x[:1], span.map(lambda t: t[:1]))
    assert padded and found.weight.shape == (HEADS, 51 - padded, 51 - padded)
    assert found.name == "mixer.mix" and found.heads == HEADS
    doc = found.span.doc[0]
    assert not found.weight[:, doc[:, None] != doc].any() and torch.equal(
        found.kv_span.pos, found.span.pos
    )
    assert (found.weight[:, 0, 0] == 1).all(), "the first token sees itself"


def test_windows_and_dilation_show_in_the_map():
    found = of("sliding")[0]
    apart = found.span.pos[0][:, None] - found.kv_span.pos[0]
    same = found.span.doc[0][:, None] == found.kv_span.doc[0]
    assert torch.equal(found.weight[0] > 0, same & (apart >= 0) & (apart < 7))


def test_longformer_has_two_maps_and_each_query_a_row_in_one():
    ordinary, whole = of("longformer")
    assert [ordinary.name, whole.name] == ["mixer.global_mix", "mixer.mix"]
    assert ((ordinary.weight.sum(-1) > 0) ^ (whole.weight.sum(-1) > 0)).all()


def test_summaries_stand_behind_the_tokens_of_the_row():
    found = of("compressed")[0]
    role = found.kv_span.role[0]
    assert (
        torch.equal(found.kv_span.pos[0, :20], found.span.pos[0])
        and (role[:20] == 0).all()
        and (role[20:] == 16).all()
    )
    assert found.weight.shape == (HEADS, 20, 20 + len(role[20:])) and found.weight[..., 20:].any()


def decoder(memory=None):
    mixers = [Attention(WIDTH, HEADS, 3, Rope()) for _ in range(2)]
    mixers = [memory.around(mixer, position=Rope()) for mixer in mixers] if memory else mixers
    return initialise(
        Decoder(31, WIDTH, mixers, [SwiGLU(WIDTH, 30) for _ in mixers], memory=memory), 5
    ).double()


def test_what_a_memory_shows_twice_has_two_columns():
    model, span = decoder(SegmentMemory(6, segment=4)), Span.line(1, 12)
    found = collect(model, leaves(model), torch.arange(12)[None], span)
    assert [each.name for each in found] == ["blocks.0.mixer.mix", "blocks.1.mixer.mix"]
    assert (
        found[0].weight.shape == (HEADS, 12, 24)
        and (found[0].weight.sum(-1) - 1).abs().max() < 1e-12
    )
    assert not (found[0].weight[..., :12].bool() & found[0].weight[..., 12:].bool()).any(), (
        "a token is seen once"
    )
    assert found[0].weight[:, 5, 12:].any() and not found[0].weight[:, 3, 12:].any()


def test_layers_that_see_no_row_are_left_out():
    assert leaves(decoder(MemoryTokens(2, segment=4))) == {}
    assert leaves(Model("rwkv7")) == {} and list(leaves(decoder())) == [
        "blocks.0.mixer.mix",
        "blocks.1.mixer.mix",
    ]


def test_the_model_is_left_as_it_was_and_few_heads_may_be_kept():
    model, tokens, span = decoder(), torch.arange(9)[None], Span.line(1, 9)
    before = model(MicroBatch(tokens, span))
    every = collect(model, leaves(model), tokens, span)
    few = collect(model, leaves(model), tokens, span, heads=2)
    assert few[0].weight.shape == (2, 9, 9) and few[0].heads == HEADS
    assert torch.equal(few[1].weight, every[1].weight[:2])
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(MicroBatch(tokens, span)), before)


@pytest.mark.full
def test_compiled_blocks_are_looked_into_and_not_compiled_again_for_it():
    graphs = []

    def compiled(graph, examples):
        graphs.append(graph)
        return graph.forward

    model, tokens, span = decoder(), torch.arange(9)[None], Span.line(1, 9)
    want = collect(model, leaves(model), tokens[:, :5], Span.line(1, 5))
    for block in model.get_submodule("blocks").children():
        block.forward = torch.compile(block.forward, backend=compiled)
    with torch.no_grad():
        model(MicroBatch(tokens, span))
    before = len(graphs)
    got = collect(model, leaves(model), tokens[:, :5], Span.line(1, 5))
    assert len(got) == 2 and all(torch.equal(a.weight, b.weight) for a, b in zip(got, want))
    assert before and len(graphs) == before


def test_a_leaf_that_is_called_again_has_another_map():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = build("full")

        def forward(self, batch):
            x, span, *_ = batch
            return self.mixer(self.mixer(x, span), span)

    (x, _), model = given(torch.float64), Twice()
    found = collect(model, leaves(model), x[:1, :9], Span.line(1, 9))
    assert [each.name for each in found] == ["mixer.mix", "mixer.mix (2)"]
    assert not torch.equal(found[0].weight, found[1].weight)
