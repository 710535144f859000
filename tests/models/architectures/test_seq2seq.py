"""The recurrent encoder-decoder: its equations, exactness over ranks, and what its windows see."""

from functools import partial

import pytest
import torch

from models.analysis.alignments import alignments
from models.architectures.seq2seq import Seq2Seq
from models.seq2seq.attention import EncodedSource, Query, StepAttention
from models.seq2seq.encoder import RecurrentEncoder
from models.span import Span
from tests.support.pool import ranks
from tests.support.two_streams import RECURRENT_WIDTH as WIDTH
from tests.support.two_streams import SHORT, VOCABULARY, batch_of, difference, recurrent, roughened

KINDS = ("none", "bahdanau", "luong_dot", "luong_general", "luong_concat", "local_m", "local_p")

CASES = [
    ("none", "gru", 2, 3, "zigzag"),
    ("bahdanau", "gru", 1, 3, "contiguous"),
    ("bahdanau", "lstm", 2, 2, "zigzag"),
    ("luong_dot", "gru", 1, 4, "zigzag"),
    ("luong_general", "lstm", 2, 3, "contiguous"),
    ("luong_concat", "gru", 1, 2, "contiguous"),
    ("local_m", "gru", 1, 3, "zigzag"),
    ("local_p", "gru", 1, 4, "contiguous"),
]


@pytest.mark.short(
    "bahdanau-gru-1-3-contiguous",
    "luong_dot-gru-1-4-zigzag",
    "luong_general-lstm-2-3-contiguous",
    "local_p-gru-1-4-contiguous",
)
@pytest.mark.parametrize(("kind", "cell", "layers", "size", "policy"), CASES)
def test_both_streams_over_ranks_change_nothing(kind, cell, layers, size, policy):
    build = partial(recurrent, kind, cell, layers)
    assert max(ranks(size, difference, build, "ring", policy, batch_of())) < 1e-11


def test_a_source_shorter_than_the_ranks_changes_nothing():
    batch = batch_of(targets=[[3, 1], [2]], sources=SHORT, tokens=5, source_tokens=2)
    build = partial(recurrent, "luong_general", "gru", 1)
    assert max(ranks(4, difference, build, "ring", "contiguous", batch)) < 1e-11


def test_the_encoder_is_torchs():
    for cell, theirs_class in (("gru", torch.nn.GRU), ("lstm", torch.nn.LSTM)):
        ours = roughened(RecurrentEncoder(WIDTH, 2, cell, bidirectional=True))
        theirs = theirs_class(WIDTH, WIDTH // 2, 2, bidirectional=True, batch_first=True).double()
        with torch.no_grad():
            for layer in range(2):
                for side, suffix in ((ours.forwards, ""), (ours.backwards, "_reverse")):
                    mine = side[layer].cell
                    for name, linear in (("ih", mine.input), ("hh", mine.recurrent)):
                        for leaf in ("weight", "bias"):
                            full = f"{leaf}_{name}_l{layer}{suffix}"
                            theirs.get_parameter(full).copy_(getattr(linear, leaf))
        hidden = torch.randn(2, 7, WIDTH, dtype=torch.float64)
        states, ends = ours(hidden, Span.line(2, 7))
        expected, _ = theirs(hidden)
        assert (states - expected).abs().max() < 1e-12
        half = WIDTH // 2
        both_ends = torch.cat([expected[:, -1, :half], expected[:, 0, half:]], -1)
        assert (ends.sum(1) - both_ends).abs().max() < 1e-12


def spelled_out(model, source, row):
    """Logits of one document, by the equations of the papers, a token and a weight at a time."""
    states, ends = model.encoder(model.source_embed(source)[None], Span.line(1, len(source)))
    memory = states[0]
    attention = model.attention
    known = ends[0].sum(0)
    if model.previous:
        known[: WIDTH // 2] = 0
    state = torch.tanh(model.bridge(known))
    cell = model.cells[0]
    fed = torch.zeros(WIDTH, dtype=torch.float64)
    nothing = torch.zeros(1, WIDTH, dtype=torch.float64)
    logits = []
    for position, token in enumerate(row):
        word = model.embed(token)

        def turn(context, state, word=word):
            entering = cell.input(word) + cell.feed(context)
            return cell.step(entering[None], (state[None],), nothing)[0][0]

        asked = state if model.previous else turn(fed, state)
        scores = []
        for key in memory:
            if attention.kind == "bahdanau":
                bent = torch.tanh(attention.query(asked) + attention.key(key))
                scores.append(attention.score(bent)[0])
            elif attention.kind == "luong_concat":
                both = torch.cat([attention.query.weight, attention.key.weight], 1)
                bent = torch.tanh(both @ torch.cat([asked, key]))
                scores.append(attention.score(bent)[0])
            elif attention.kind == "luong_dot":
                scores.append(asked @ key)
            else:
                scores.append(asked @ attention.key.weight @ key)
        exponents = torch.stack(scores).exp()
        places = torch.arange(len(memory), dtype=torch.float64)
        if attention.kind == "local_m":
            exponents = exponents * ((places - position).abs() <= attention.window)
        gauss = torch.ones_like(exponents)
        if attention.kind == "local_p":
            bent = torch.tanh(attention.centre.weight @ asked)
            centre = len(memory) / (1 + (-(attention.centre_score.weight[0] @ bent)).exp())
            exponents = exponents * ((places - centre).abs() <= attention.window)
            gauss = (-((places - centre) ** 2) / (2 * attention.sigma**2)).exp()
        # A window beyond the end of the source holds nothing.
        weights = exponents / exponents.sum().clamp_min(1e-300) * gauss
        context = weights @ memory
        if model.previous:
            after = turn(context, asked)
            parts = model.readout(torch.cat([asked, context, word]))
            output = torch.maximum(parts[0::2], parts[1::2])
            state = after
        else:
            state = asked
            output = torch.tanh(model.readout.weight @ torch.cat([context, state]))
            fed = output
        logits.append(model.head(output))
    return torch.stack(logits)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_documents_of_packed_rows_follow_the_equations_of_the_papers(kind):
    model = roughened(recurrent(kind))
    batch = batch_of()
    logits = model(batch.without_targets())
    for row, document in ((0, 1), (1, 0), (1, 1)):
        of_source = batch.source.span.doc[row] == document
        of_row = batch.span.doc[row] == document
        source = batch.source.tokens[row][of_source]
        expected = spelled_out(model, source, batch.tokens[row][of_row])
        assert (logits[row][of_row] - expected).abs().max() < 1e-12


def test_local_attention_with_a_wide_window_is_global():
    """D >= S and a deviation that goes to infinity (CATALOGUE: no public class to compare with)."""
    torch.manual_seed(0)
    attentions = {
        kind: roughened(StepAttention(WIDTH, kind, window=40, sigma=1e9))
        for kind in ("luong_general", "local_m", "local_p")
    }
    weight = attentions["luong_general"].key.weight.detach()
    values = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    hidden = torch.randn(2, WIDTH, dtype=torch.float64)
    places = torch.arange(9).expand(2, 9)
    query = Query(hidden, torch.tensor([0, 0]), torch.tensor([3, 8]), torch.tensor([9, 9]))
    contexts = {}
    for kind, attention in attentions.items():
        with torch.no_grad():
            attention.key.weight.copy_(weight)
        memory = EncodedSource(attention.keys(values), values, torch.zeros_like(places), places)
        contexts[kind] = attention(query, memory)
    for kind in ("local_m", "local_p"):
        assert (contexts[kind] - contexts["luong_general"]).abs().max() < 1e-12


def test_the_gaussian_is_not_normalised_again_and_teaches_its_centre():
    attention = roughened(StepAttention(WIDTH, "local_p", window=40, sigma=2.0))
    values = torch.ones(1, 9, WIDTH, dtype=torch.float64)
    places = torch.arange(9)[None]
    memory = EncodedSource(attention.keys(values), values, torch.zeros_like(places), places)
    query = Query(
        torch.randn(1, WIDTH, dtype=torch.float64), *(torch.tensor([n]) for n in (0, 0, 9))
    )
    context = attention(query, memory)
    # Every value is 1, so the context is the mass that the Gaussian left.
    assert (context < 0.99).all() and (context > 0.01).all()
    context.sum().backward()
    assert attention.centre.weight.grad.abs().max() > 1e-6


def test_alignments_are_weights_over_the_source_of_the_document():
    batch = batch_of()
    weights = alignments(roughened(recurrent("bahdanau")), batch)
    assert weights.shape == (*batch.span.shape, batch.source.span.shape[1])
    same = batch.span.doc[:, :, None] == batch.source.span.doc[:, None]
    assert (weights[~same] == 0).all()
    has_source = (same & batch.span.valid()[:, :, None]).any(2)
    assert (weights.sum(2)[has_source] - 1).abs().max() < 1e-12
    with pytest.raises(ValueError, match="weighs no source"):
        alignments(recurrent("none"), batch)


def test_an_odd_width_of_two_directions_is_refused():
    with pytest.raises(ValueError, match=r"model\.width=7 is not even"):
        Seq2Seq(VOCABULARY, 7, 1)


def test_a_row_without_a_source_is_refused():
    with pytest.raises(ValueError, match="reads a source beside each row"):
        recurrent("luong_dot")(batch_of()._replace(source=None))
