"""Recurrent memory: what goes through the layers, how far gradients reach, and that cuts between
rows are invisible."""

import pytest
import torch

from models.attention.full import Attention, MultiHead
from models.auxiliary import on_step_begin
from models.carried_state import CarriedState
from models.masks.algebra import Bounds, visible
from models.masks.roles import RoleQuery
from models.memory.tokens import MEMORY, MemoryTokens, RecurrentMemory, enclosed
from models.micro_batch import MicroBatch
from models.positions.rope import Rope
from models.primitives.sequential import SequentialScan
from models.span import READ, TEXT, WRITE, Span
from tests.support.parity import packed, relative
from tests.support.recurrent_decoder import VOCABULARY, decoder, lanes
from tests.variants import HEADS, VARIANTS, WIDTH

REFUSED = {"prefix", "compressed", "compressed_dense"}
MIXERS = [name for name in VARIANTS if name not in REFUSED | {"channel_mix", "hyena"}]


def spelled_out(model, tokens, span, carried):
    """[B, T, V]: document by document, segment by segment, each alone on a row of its own;
    `carried`: memory of each row."""
    stack = model.memory
    m, size = stack.settings.length, stack.settings.segment
    out = torch.zeros(*tokens.shape, VOCABULARY, dtype=model.embed.weight.dtype)
    for row in range(len(tokens)):
        memory = carried.get(row, stack.memory)
        begins = [
            t for t in range(tokens.shape[1]) if t == 0 or span.doc[row, t] != span.doc[row, t - 1]
        ] + [tokens.shape[1]]
        for first, last in zip(begins[:-1], begins[1:]):
            if span.doc[row, first] < 0:
                continue
            memory = stack.memory if span.pos[row, first] == 0 else memory
            for start in range(first, last, size or last):
                stop = min(start + (size or last), last)
                x = torch.cat([memory, model.embed(tokens[row, start:stop]), memory])[None]
                line = Span.line(1, x.shape[1])
                roles = [READ] * m + [TEXT] * (stop - start) + [WRITE] * m
                y = model._through(x, Span(line.pos, line.doc, torch.tensor([roles])))[0]
                out[row, start:stop] = model.head(model.norm(y[m : m + stop - start]))
                memory = stack.norm(y[m + stop - start :])
        carried[row] = memory.detach()
    return out


@pytest.mark.parametrize("segment", [7, 1, None])
@pytest.mark.parametrize("mixer", ["full", "rwkv7", "mamba2", "longformer", "sliding"])
def test_packed_rows_are_documents_read_segment_by_segment(mixer, segment):
    model, span = decoder(mixer, segment=segment), packed([[13, 1, 24, 9], [3, 40, 1, 1]])
    tokens = torch.randint(VOCABULARY, span.shape, generator=torch.Generator().manual_seed(3))
    got, want = model(MicroBatch(tokens, span)), spelled_out(model, tokens, span, {})
    assert relative(got * span.valid()[..., None], want) < 1e-12


def test_what_is_read_and_written_sees_what_it_should():
    """Rows of the table: who looks; columns: at whom. r r are read, t t t the segment, w w written,
    . is no token."""
    span, order = enclosed(packed([[3]], 4), 2)
    assert (
        order.tolist() == [[0, 1, 2, 3, 4, 6, 7, 5]]
        and span.role[0, :7].tolist() == [READ] * 2 + [TEXT] * 3 + [WRITE] * 2
    )
    mixer = MemoryTokens(2, 4).around(Attention(WIDTH, HEADS, 3, Rope()))
    seen = visible(mixer.mix.mask, span, span)[0, 0]
    want = """
        xx......
        xx......
        xxx.....
        xxxx....
        xxxxx...
        xxxxxxx.
        xxxxxxx.
        ........"""
    assert ["".join(".x"[int(v)] for v in row) for row in seen] == want.split()


def test_a_query_of_a_longformer_sees_memory_through_one_of_its_softmaxes():
    span, _ = enclosed(packed([[9, 4], [13]], 13), 3)
    mixer = MemoryTokens(3, 9).around(VARIANTS["longformer"]())
    heads = torch.arange(HEADS)
    local, whole = (
        visible(mix.mask, span, span, heads).expand(2, HEADS, 19, 19)
        for mix in (mixer.mix, mixer.global_mix)
    )
    assert not (local.any(-1) & whole.any(-1)).any()
    assert (
        (local | whole)[..., :3].all(-1).eq(span.valid()[:, None]).all()
        and local.any()
        and whole.any()
    )


def test_the_mask_says_the_same_of_boxes_and_runs_as_of_tokens():
    span, _ = enclosed(packed([[9, 4], [13]], 13), 3)
    dense = MEMORY.dense(span, span)[:, 0]
    for row in range(2):
        for a in range(0, 19, 3):
            for b in range(0, 19, 4):
                q, k = (_box(span, row, i, i + 4) for i in (a, b))
                part = dense[row, a : a + 4, b : b + 4]
                assert MEMORY.coverage(q, k) in (
                    {1, 2} if part.all() else {1} if part.any() else {0, 1}
                )
    assert RoleQuery(WRITE).band(_box(span, 0, 0, 3), _box(span, 0, 0, 3)) == (1, 0)
    assert RoleQuery(READ).band(_box(span, 0, 0, 3), _box(span, 0, 0, 3))[0] < -1000


def _box(span, row, start, stop):
    bounds = [
        f(t[row, start:stop]).item()
        for t in (span.pos, span.doc, span.role)
        for f in (torch.amin, torch.amax)
    ]
    return Bounds(*bounds, run=False)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_reads_as_if_its_document_were_alone(mixer):
    """Packed between others, and by itself."""
    model, span = decoder(mixer, layers=1, segment=6), packed([[13, 1, 24, 9]])
    tokens = torch.randint(VOCABULARY, span.shape, generator=torch.Generator().manual_seed(3))
    whole, start = model(MicroBatch(tokens, span)), 0
    for length in (13, 1, 24, 9):
        alone = model(MicroBatch(tokens[:, start : start + length], Span.line(1, length)))
        assert relative(whole[:, start : start + length], alone) < 1e-11
        start += length


@pytest.mark.parametrize(
    "mixer",
    [name for name in MIXERS if not name.startswith("bidirectional") and "symmetric" not in name],
)
def test_no_mixer_sees_what_comes_later(mixer):
    model = decoder(mixer, layers=1, segment=6)
    x = torch.randn(
        1, 20, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    ).requires_grad_()
    y = model.memory(x, Span.line(1, 20), model._through)
    (d_x,) = torch.autograd.grad(y[0, 13].sum(), x)
    assert d_x[0, 14:].abs().max() == 0 and d_x[0, :14].abs().max() > 0


def run(model, steps, past):
    """Logits of consecutive rows of the same lanes."""
    found = []
    for tokens, span, _ in steps:
        found.append(model(MicroBatch(tokens, past.attach(span) if past else span)))
        if past:
            past.advance()
    return found


@pytest.mark.parametrize("mixer", ["full", "retention"])
def test_rows_with_their_past_are_the_whole_at_once(mixer):
    """Two lanes of three rows of 48 tokens, whose segments begin where those of the whole do."""
    model = decoder(mixer, segment=6)
    whole = packed([[96, 24, 24], [144]], 144)
    tokens = torch.randint(VOCABULARY, whole.shape, generator=torch.Generator().manual_seed(3))
    want = model(MicroBatch(tokens, whole))
    rows = [
        (tokens[:, i : i + 48], whole.map(lambda t, i=i: t[:, i : i + 48]), None)
        for i in (0, 48, 96)
    ]
    got = torch.cat(run(model, rows, CarriedState()), 1)
    assert relative(got, want) < 1e-12
    alone = torch.cat(run(model, rows, None), 1)
    assert (
        relative(alone[:, :48], want[:, :48]) < 1e-12
        and relative(alone[:, 48:], want[:, 48:]) > 1e-3
    )


def test_documents_that_end_and_begin_in_lanes_are_read_as_one_row_would_be():
    """Cuts of rows inside and on the borders of documents; a memory goes on with its document and
    no further."""
    model, past, carried = decoder(segment=7), CarriedState(), {}
    for tokens, span, _ in lanes():
        got, want = (
            model(MicroBatch(tokens, past.attach(span))),
            spelled_out(model, tokens, span, carried),
        )
        assert relative(got * span.valid()[..., None], want) < 1e-12
        past.advance()
        assert all(
            relative(past.states["memory"][1][row], carried[row]) < 1e-12 for row in range(2)
        )


def reached(depth, model=None):
    """For each segment that gives a loss, which segments' tokens it has a gradient to."""
    model = model or decoder(segment=4, depth=depth)
    x = torch.randn(
        1, 20, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    ).requires_grad_()
    y = model.memory(x, Span.line(1, 20), model._through)
    table = []
    for piece in range(5):
        (d_x,) = torch.autograd.grad(
            y[0, piece * 4 : piece * 4 + 4].square().sum(), x, retain_graph=True
        )
        table.append("".join(".x"[int(d_x[0, i : i + 4].abs().max() > 0)] for i in range(0, 20, 4)))
    return table


UNCUT = ["x....", "xx...", "xxx..", "xxxx.", "xxxxx"]


def test_the_gradient_reaches_back_over_depth_segments_and_no_further():
    assert reached(1) == ["x....", ".x...", "..x..", "...x.", "....x"]
    assert reached(2) == ["x....", "xx...", "..x..", "..xx.", "....x"]
    assert reached(3) == ["x....", "xx...", "xxx..", "...x.", "...xx"]
    assert reached(None) == reached(5) == UNCUT


def test_a_truncation_that_detaches_a_local_name_is_found_out():
    """The slip of a published recipe: the detached state is bound to the name inside a function and
    dropped there."""

    class Careless(SequentialScan):
        def forward(self, step, xs, state, *, span, size=None, depth=None):
            def manage(state):
                state = tuple(s.detach() for s in state)

            def careless(xs, span, state):
                manage(state)
                return step(xs, span, state)

            return super().forward(careless, xs, state, span=span, size=size)

    model = decoder(segment=4, depth=1)
    model.memory.relay = Careless(model.memory.relay.cutter)
    assert reached(1, model) == UNCUT != reached(1)


def test_a_gradient_that_is_cut_is_the_same_where_it_is_not():
    """With depth 2 of 4 segments: the gradient is that of two rows of two segments each, read with
    a past."""
    model, x = (
        decoder(segment=4, depth=2),
        torch.randint(VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(3)),
    )
    span, past = Span.line(1, 16), CarriedState()
    model(MicroBatch(x, span)).square().sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.memory.depth = None
    for i in (0, 8):
        part = past.attach(span.map(lambda t, i=i: t[:, i : i + 8]))
        model(MicroBatch(x[:, i : i + 8], part)).square().sum().backward()
        past.advance()
    assert max(relative(p.grad, want[name]) for name, p in model.named_parameters()) < 1e-12


def test_the_curriculum_is_a_function_of_the_step():
    model = decoder(segment=4, depth=4, curriculum=[3, 4, 10])
    depths = []
    for step in (1, 2, 3, 4, 9, 10, 11, 2):
        on_step_begin(model, step)
        depths.append(model.memory.depth)
    assert depths == [1, 1, 2, 3, 3, 4, 4, 1]
    on_step_begin(model, 1)
    assert reached(None, model)[4] == "....x"


def test_recomputation_changes_nothing_but_what_is_kept():
    span = packed([[13, 1, 24, 9], [3, 40, 1, 1]])
    tokens = torch.randint(VOCABULARY, span.shape, generator=torch.Generator().manual_seed(3))
    grads, kept = [], []
    for recompute in (False, True):
        model, saved = decoder(segment=7, recompute=recompute), 0

        def note(t):
            nonlocal saved
            saved += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = model(MicroBatch(tokens, span)).square().sum()
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        kept.append(saved)
    assert max(relative(grads[1][name], grads[0][name]) for name in grads[0]) < 1e-12
    assert kept[1] < kept[0] / 3


def test_memory_tokens_learn_and_are_what_a_document_starts_from():
    model = decoder(segment=4)
    model(
        MicroBatch(torch.zeros(1, 8, dtype=torch.long), Span.line(1, 8))
    ).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.memory.parameters())
    assert isinstance(model.memory, RecurrentMemory) and model.memory.memory.shape == (3, WIDTH)


@pytest.mark.parametrize("mixer", sorted(REFUSED))
def test_a_mixer_without_such_a_form_is_refused_by_name(mixer):
    made = VARIANTS[mixer]()
    with pytest.raises(
        ValueError,
        match=r"memory=tokens reads segment by segment, and (PrefixAttention|Compressed) .* use ",
    ):
        MemoryTokens(3, 4).around(getattr(made, "inner", made))


def test_a_hyena_needs_filters_as_long_as_a_segment_with_its_memory():
    for segment, fits in ((45, True), (46, False), (None, False)):
        make = lambda segment=segment: MemoryTokens(3, segment).around(  # noqa: E731
            VARIANTS["hyena"](), context_length=51
        )
        if fits:
            make()
        else:
            with pytest.raises(ValueError, match=r"use memory\.segment=45 or less"):
                make()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"length": 0}, "memory.length=0: memory=tokens needs 1 or more"),
        ({"segment": 0}, "memory.segment=0"),
        ({"depth": 0}, "memory.depth=0"),
        ({"curriculum": [5]}, "memory.depth=None"),
        ({"depth": 3, "curriculum": [5]}, "give depth - 1 steps"),
        ({"depth": 3, "curriculum": [9, 5]}, "rising"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        MemoryTokens(**{"length": 3, "segment": 4, **settings})


def test_mixers_without_attention_are_left_as_they_are():
    kinds = [type(m) for m in VARIANTS["retention"]().modules()]
    assert [type(m) for m in MemoryTokens(3, 4).around(VARIANTS["retention"]()).modules()] == kinds
    assert (
        MultiHead(WIDTH, HEADS, Rope()).mix.mask == Attention(WIDTH, HEADS, 3, Rope()).mix.mask
    )  # shared masks untouched
