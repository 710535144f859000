"""Graphs: unseen ones are held out whole, nodes of a single one are held out one by one, and files
that are no graphs are refused."""

import json

import numpy as np
import pytest
import torch

from models.loss import IGNORE
from models.primitives.neighbors import NO_NEIGHBOR
from trainer.data.errors import DataError
from trainer.data.streams.synthetic import SyntheticStream
from trainer.data.tasks.graphs import Graphs, held_out_nodes
from trainer.errors import UserError
from trainer.preflight.prepare import load_config

PATH = {"features": [0, 1, 2, 3], "labels": [1, 0, None, 1], "edges": [[0, 1], [1, 2], [3, 2]]}


def rows(task, split, length, rows=4):
    stream = SyntheticStream(task, context_length=length, rows=rows, seed=0, split=split)
    return stream.read(stream.start())[0]


def test_a_node_of_a_generated_graph_asks_for_its_class_where_it_is_not_trusted():
    task = Graphs(degree=3, min_nodes=24, max_nodes=28, classes=3)
    random = np.random.default_rng(0)
    right = total = 0
    for _ in range(50):
        tokens, _, targets, *_ = task.example(random)
        assert targets is not None and 24 <= len(tokens) <= 28 and tokens.shape[1] == 4
        named, trusted = tokens[:, 0] // 2, tokens[:, 0] % 2 == 1
        assert ((targets == IGNORE) == trusted).all()
        assert (named != targets)[~trusted].all(), "they name a wrong class"
        for node, sources in enumerate(tokens[:, 1:].tolist()):
            assert len({*sources, node}) == 4, "different others"
            if not trusted[node]:
                votes = [named[source] for source in sources if trusted[source]]
                right += sum(vote == targets[node] for vote in votes)
                total += len(votes)
    assert 0.6 < right / total < 0.8, "a share of 0.7 of the sources is of the node's class"


def test_the_karate_club_is_whole_in_both_splits_and_asks_for_different_members():
    task = Graphs(graph="karate", held_out=0.5)
    assert (task.longest, task.degree, task.vocabulary) == (34, 17, 34)
    train, held_out = (rows(task, split, 34, 1) for split in ("train", "held_out"))
    assert torch.equal(train.tokens, held_out.tokens)
    assert int((train.tokens[0, :34, 1:] != NO_NEIGHBOR).sum()) == 2 * 78
    asked = [batch.targets()[0] != IGNORE for batch in (train, held_out)]
    assert not (asked[0] & asked[1]).any() and (asked[0] | asked[1]).all()
    assert held_out_nodes(34, 0.5) == asked[1].nonzero()[:, 0].tolist()
    assert train.targets()[0][asked[0]].unique().tolist() == [0, 1]


def test_unseen_graphs_are_held_out_and_padding_has_no_width_of_its_own():
    task = Graphs(min_nodes=4, max_nodes=6, degree=2, held_out=0.4)
    train, held_out = (rows(task, split, 20, 8) for split in ("train", "held_out"))
    assert train.tokens.shape == (8, 21, 3)
    assert train.part(6, 10).tokens.shape == (4, 21, 3)
    graphs = []
    for batch in (train, held_out):
        graphs.append(set())
        for row, doc in zip(batch.tokens, batch.doc, strict=True):
            for number in range(int(doc.max()) + 1):
                graphs[-1].add(row[doc == number].numpy().tobytes())
    assert graphs[0] and graphs[1] and not graphs[0] & graphs[1]


def test_a_file_of_graphs(tmp_path):
    path = tmp_path / "graphs.jsonl"
    path.write_text(json.dumps(PATH) + "\n\n" + json.dumps(PATH | {"edges": []}))
    task = Graphs(graph=str(path))
    assert (task.longest, task.degree, task.vocabulary, len(task.graphs)) == (4, 2, 4, 2)
    tokens, _, targets, *_ = task._example(task.graphs[0])
    assert tokens.tolist() == [[0, -1, -1], [1, 0, -1], [2, 1, 3], [3, -1, -1]]
    assert targets is not None and targets.tolist() == [1, 0, IGNORE, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"edges": [[0, 7]]}, r"line 1: edge \[0, 7\] is to node 7, which is not there; .* 0 to 3"),
        ({"edges": [[0, -1]]}, "is to node -1, which is not there"),
        ({"edges": [[0]]}, r"edge \[0\] is no pair"),
        ({"features": [], "labels": []}, "a graph of no nodes"),
        ({"labels": [1]}, "4 features and 1 labels"),
        ({"labels": [1, "a", 0, 0]}, "'a' is no feature or label"),
        ({"features": 3}, "are lists"),
    ],
)
def test_lines_that_are_no_graphs_are_refused(tmp_path, change, words):
    path = tmp_path / "graphs.jsonl"
    path.write_text(json.dumps(PATH | change))
    with pytest.raises(DataError, match=words):
        Graphs(graph=str(path))


def test_files_and_sizes_that_cannot_be_are_refused(tmp_path):
    path = tmp_path / "graphs.jsonl"
    path.write_text("[1]\n")
    for settings, words in (
        ({"graph": str(tmp_path / "none.jsonl")}, "there is no such file; use trust, karate or"),
        ({"graph": str(path)}, "line 1: a graph is an object"),
        ({"degree": 24}, r"data\.degree=24: .* use data\.degree=23 or less"),
        ({"min_nodes": 1}, r"data\.min_nodes=1"),
    ):
        with pytest.raises(DataError, match=words):
            Graphs(**settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model=full", "data=graphs"), "data=Graphs.*which Decoder would not read; use model=gat"),
        (("model=gat", "data=sets"), "data=Sets.*have no edges.*use data=graphs"),
    ],
)
def test_graphs_and_models_that_read_edges_belong_together(words, message):
    sizes = ("context_length=64", "batch_tokens=128", "wandb.mode=disabled", "log.plots=false")
    with pytest.raises(UserError, match=message):
        load_config((*words, *sizes))
