"""Attention maps of models of two streams: each stream by itself, and the row over its source."""

import json
import re

import pytest
import torch

from models.carried_state import name_stateful_modules
from parallel.context_parallel import apply_context_parallel
from parallel.mesh import Mesh, build_mesh
from tests.support.parity import relative
from tests.support.pool import ranks
from tests.support.two_streams import recurrent, roughened, transformer
from trainer.data.batch_sharding import BatchSharder
from trainer.data.open import open_stream
from trainer.evaluation.attention_maps import attention_maps, beginning, write_page

LENGTH = 30
TOKENS = 14  # of the row that are drawn; they end inside a document
MODELS = {
    "transformer": transformer,
    "bahdanau": lambda: recurrent("bahdanau", "lstm", 2),
    "local_p": lambda: recurrent("local_p"),
}


def stream():
    data = {"_target_": "trainer.data.tasks.reverse.Reverse", "symbols": 10}
    data |= {"min_length": 3, "max_length": 7}
    return open_stream(data, context_length=LENGTH, rows=2, seed=0, split="held_out")


def maps(model, mesh, policy="zigzag"):
    share = BatchSharder(
        mesh, rows=2, context_length=LENGTH, micro_batch="auto", policy=policy, prefix=0
    )
    found, left_out = attention_maps(model.eval(), share, stream(), TOKENS)
    assert left_out == 0
    return found


def model_of(name):
    model = roughened(MODELS[name]())
    name_stateful_modules(model)
    return model


def shared(env, name, policy):
    mesh = build_mesh(env.size, 1)
    model = model_of(name)
    apply_context_parallel(model, mesh.context.group, "ring", grid=mesh.grid)
    found = maps(model, mesh, policy)
    want = maps(model_of(name), Mesh.alone())
    assert [each[:1] + each[2:3] for each in found] == [each[:1] + each[2:3] for each in want]
    return [relative(a.weight, b.weight) for a, b in zip(found, want, strict=True)]


@pytest.mark.parametrize(
    ("name", "policy"),
    [("transformer", "zigzag"), ("bahdanau", "contiguous"), ("local_p", "zigzag")],
)
def test_maps_over_three_ranks_are_those_of_one_device(name, policy):
    for worst in ranks(3, shared, name, policy):
        assert max(worst) < 1e-11, worst


@pytest.mark.parametrize("name", MODELS)
def test_an_alignment_weighs_the_source_of_the_document_and_nothing_else(name):
    found = maps(model_of(name), Mesh.alone())
    row = beginning(stream(), TOKENS)
    source_tokens = int((row.source.doc[0, :-1] >= 0).sum())
    assert int(row.source.doc[:, :-1].max()) == int(row.doc[:, :TOKENS].max())
    aligned = [each for each in found if each.streams == "alignment"]
    assert aligned and aligned[-1].weight.shape[1:] == (TOKENS, source_tokens)
    for each in aligned:
        same = each.span.doc[0][:, None] == each.kv_span.doc[0][None]
        assert (each.weight[:, ~same] == 0).all()
        if name != "local_p":
            assert (each.weight.sum(-1) - 1).abs().max() < 1e-12
    kinds = [each.streams for each in found]
    expected = (
        {"source": 2, "row": 2, "alignment": 2} if name == "transformer" else {"alignment": 1}
    )
    assert {kind: kinds.count(kind) for kind in set(kinds)} == expected


@pytest.mark.parametrize("name", ["transformer", "bahdanau"])
def test_the_page_names_the_tokens_of_both_streams(name, tmp_path):
    model = model_of(name)
    found = maps(model, Mesh.alone())
    page = write_page(tmp_path, "a title", found, [], model, stream()).read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    row = beginning(stream(), TOKENS)
    decode = stream().tokenizer.decode
    assert data["tokens"] == [decode([token]) for token in row.tokens[0, :TOKENS].tolist()]
    # The last token of a row is not read.
    source = row.source.tokens[0, :-1].tolist()
    assert data["source"] == [decode([token]) for token in source]
    sides = {"row": ("tokens", "tokens"), "source": ("source", "source")}
    sides["alignment"] = "tokens", "source"
    assert len(data["layers"]) == len(found)
    for layer, attention in zip(data["layers"], found, strict=True):
        assert (layer["down"], layer["right"]) == sides[attention.streams]
        assert (layer["rollout"] is None) == (attention.streams == "alignment")
        assert ("induction" in layer["heads"][0]) == (attention.streams != "alignment")
    assert "SharedMemoryRead" not in page and "MemoryRead" not in page


def test_a_decoder_without_attention_has_no_map():
    model = roughened(recurrent("none"))
    name_stateful_modules(model)
    assert maps(model, Mesh.alone()) == []
    assert torch.is_grad_enabled()
