"""Mixtures: shares, epochs, one cursor, held-out documents by source, and faults."""

import json

import pytest
import torch

from tests.support.chats import CHATS, saved_tokenizer
from trainer.data.cursors import misfit
from trainer.data.open import check, open_stream

CONTEXT = 16
SETTINGS = {"context_length": CONTEXT, "rows": 4, "seed": 0}
SIZES = {"large": 300, "middle": 30, "small": 3}
FILES = "trainer.data.sources.files.Files"
TASK = "trainer.data.tasks.copy.CopyTask"


@pytest.fixture
def source(tmp_path):
    """source(name, **settings): a node of files whose documents spell the name."""

    def make(name, count=None, **settings):
        path = tmp_path / f"{name}.jsonl"
        texts = [f"{name} {number} " * 5 for number in range(count or SIZES[name])]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        node = {"_target_": FILES, "path": str(path), "held_out": 0.0}
        return node | {"cache": str(tmp_path / "cache")} | settings

    return make


@pytest.fixture
def mixture(source):
    """mixture(weights, **settings): a node of the three sources."""

    def make(weights=None, held_out=0.0, **settings):
        node = {
            "_target_": "trainer.data.sources.mixture.Mixture",
            "sources": {name: source(name, held_out=held_out) for name in SIZES},
            "weights": weights or {"large": 5, "middle": 3, "small": 0.1},
        }
        return node | settings

    return make


def read(stream, count, cursor=None):
    """(batches, cursor behind them), the cursor going through JSON."""
    cursor = cursor or stream.start()
    batches = []
    for _ in range(count):
        batch, cursor = stream.read(json.loads(json.dumps(cursor)))
        batches.append(batch)
    return batches, cursor


def origin(tokens):
    """The source of a row of bytes, by letters that the other names do not have."""
    text = bytes(token for token in tokens.tolist() if token < 256).decode()
    (name,) = [
        name for name, own in {"large": "g", "middle": "d", "small": "s"}.items() if own in text
    ]
    return name


def counted(batches):
    """{source: tokens} by what the rows spell."""
    tokens = dict.fromkeys(SIZES, 0)
    for batch in batches:
        for row, doc in zip(batch.tokens, batch.doc):
            tokens[origin(row)] += int((doc[:-1] >= 0).sum())
    return tokens


def test_shares_hold_to_within_a_row_after_any_batch(mixture):
    stream = open_stream(mixture(), **SETTINGS)
    cursor = stream.start()
    batches = []
    for _ in range(60):
        batch, cursor = stream.read(cursor)
        batches.append(batch)
        total = sum(cursor["given"].values())
        for name, weight in {"large": 5, "middle": 3, "small": 0.1}.items():
            assert abs(cursor["given"][name] - total * weight / 8.1) < CONTEXT
    assert counted(batches) == cursor["given"]
    assert stream.progress(cursor).startswith(f"large gave {cursor['given']['large']} tokens")


def test_rows_are_those_of_the_sources_in_their_order(mixture, source):
    stream = open_stream(mixture(), **SETTINGS)
    rows = [row for batch in read(stream, 30)[0] for row in batch.tokens]
    for name in SIZES:
        alone = open_stream(source(name), **(SETTINGS | {"rows": 1}))
        own = [row for row in rows if origin(row) == name]
        wanted = [batch.tokens[0] for batch in read(alone, len(own))[0]]
        assert own and all(torch.equal(a, b) for a, b in zip(own, wanted))


def test_a_cursor_goes_on_exactly_from_any_batch(mixture):
    weights = {"large": [[0, 1], [20, 3]], "middle": 1, "small": [[5, 0], [15, 1]]}
    node = mixture(weights, epochs={"small": 2})
    whole, last = read(open_stream(node, **SETTINGS), 40)
    assert last["ended"] == {"large": 0, "middle": 0, "small": 1}
    for stop in (1, 9, 25):
        _, cursor = read(open_stream(node, **SETTINGS), stop)
        assert misfit(open_stream(node, **SETTINGS).start(), cursor) is None
        rest, end = read(open_stream(node, **SETTINGS), 40 - stop, cursor)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(whole[stop:], rest))
        assert end == last


def test_other_weights_read_the_sources_on_where_they_were(mixture):
    _, cursor = read(open_stream(mixture(epochs={"small": 0.5}), **SETTINGS), 60)
    other = open_stream(
        mixture({"large": 1, "middle": 1, "small": 1}, epochs={"small": 0.5}), **SETTINGS
    )
    beginning = other.follow(cursor)
    assert beginning["sources"] == cursor["sources"] and beginning["rows"] == 0
    assert beginning["ended"] == cursor["ended"] and beginning["given"] == other.start()["given"]
    longer = open_stream(mixture(), **(SETTINGS | {"context_length": 32}))
    assert longer.follow(cursor) == longer.start()
    assert other.follow({"rows": 3, "fingerprint": "of files"}) == other.start()


def test_a_source_is_read_so_many_times_and_the_others_take_over(mixture):
    stream = open_stream(
        mixture({"large": 5, "middle": 3, "small": 2}, epochs={"small": 2.5}), **SETTINGS
    )
    _, cursor = read(stream, 80)
    small = stream.streams["small"]
    assert cursor["sources"]["small"]["rows"] == round(2.5 * small.epoch_rows)
    total = cursor["given"]["large"] + cursor["given"]["middle"]
    assert abs(cursor["given"]["large"] - total * 5 / 8) < 2 * CONTEXT
    said = stream.progress(cursor)
    assert f"small gave {cursor['given']['small']} tokens" in said and "read 2.5" in said
    assert "used up" in said.rpartition("small")[2]


def test_a_mixture_that_is_used_up_is_one_message(mixture):
    stream = open_stream(mixture(epochs=dict.fromkeys(SIZES, 0.02)), **SETTINGS)
    with pytest.raises(ValueError, match=r"data\.epochs: every source is used up after \d+ rows"):
        read(stream, 100)


def test_held_out_documents_are_read_once_and_by_source(mixture):
    node = mixture(held_out=0.3)
    stream = open_stream(node, split="held_out", **SETTINGS)
    batches, cursor = read(stream, stream.batches + 1)
    assert (batches[-1].doc == -1).all()
    for name, part in stream.by_source.items():
        own = read(part, part.batches)[0]
        assert sum(int((batch.doc[:, :-1] >= 0).sum()) for batch in own) == cursor["given"][name]
        assert counted([b for b in own if (b.doc >= 0).all()])[name] > 0 or name == "small"
    again = open_stream(node, split="held_out", **(SETTINGS | {"seed": 3}))
    assert torch.equal(read(again, 1)[0][0].tokens, batches[0].tokens)


def test_sources_without_held_out_documents_are_left_out_of_the_loss(mixture, source):
    node = mixture()
    node["sources"]["large"] = source("large", held_out=0.1)
    assert check(node, evaluates=True) == []
    stream = open_stream(node, split="held_out", **SETTINGS)
    assert list(stream.by_source) == ["large"]
    node["sources"]["large"] = source("large")
    assert "keeps no document for evaluation" in check(node, evaluates=True)[0]


def test_any_source_can_be_mixed(mixture, source, tmp_path):
    folder = str(saved_tokenizer(tmp_path / "tokenizer"))
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in CHATS))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text('{"text": "streamed text"}\n' * 50)
    sources = {
        "files": source("large"),
        "hub": {"_target_": "trainer.data.sources.hub.Hub", "name": str(tmp_path / "hub")},
        "chats": {
            "_target_": "trainer.data.sources.conversations.Conversations",
            "path": str(chats),
            "held_out": 0.0,
            "cache": str(tmp_path / "cache"),
        },
    }
    node = mixture(dict.fromkeys(sources, 1), sources=sources, tokenizer=folder)
    assert check(node) == []
    settings = SETTINGS | {"context_length": 96}
    whole, last = read(open_stream(node, **settings), 12)
    _, cursor = read(open_stream(node, **settings), 5)
    rest, end = read(open_stream(node, **settings), 7, cursor)
    assert end == last and all(torch.equal(a.tokens, b.tokens) for a, b in zip(whole[5:], rest))
    shares = [given / sum(last["given"].values()) for given in last["given"].values()]
    assert max(shares) - min(shares) < 2 * 96 / sum(last["given"].values())


def test_tasks_with_the_same_tokens_can_be_mixed(mixture):
    tasks = {
        name: {"_target_": TASK, "max_length": length} for name, length in (("a", 2), ("b", 6))
    }
    stream = open_stream(mixture({"a": 1, "b": 3}, sources=tasks), **SETTINGS)
    _, cursor = read(stream, 20)
    total = sum(cursor["given"].values())
    assert abs(cursor["given"]["b"] - 0.75 * total) < CONTEXT


def broken(key, value):
    def change(node):
        node["sources"]["small"][key] = value

    return change


FAULTS = {
    "no sources": (lambda n: n.update(sources={}), "data=mixture needs data.sources; name one"),
    "no node": (lambda n: n["sources"].update(x=3), "data.sources.x: a source is needed"),
    "nested": (
        lambda n: n["sources"].update(x={"_target_": n["_target_"]}),
        "data.sources.x: a mixture cannot be mixed",
    ),
    "no weight": (lambda n: n["weights"].pop("small"), "data.weights.small: the source has no"),
    "other weight": (lambda n: n["weights"].update(y=1), "data.weights.y: there is no such source"),
    "nothing": (lambda n: n["weights"].update(dict.fromkeys(SIZES, 0)), "they add up to 0"),
    "epochs": (lambda n: n.update(epochs={"small": 0}), "data.epochs.small=0 is no number"),
    "no field": (broken("text_field", "body"), "has no field 'body'"),
    "no file": (broken("path", "none/*.txt"), "data.sources.small.path=none/*.txt matches no file"),
    "setting": (broken("held_out", 2), "data.sources.small.held_out=2 is no fraction"),
    "unknown": (broken("colour", 1), "data.sources.small.colour is not a setting"),
    "tokenizer": (broken("pad_vocabulary_to", 64), "data.sources.small: its tokens are others"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_message_before_a_rank_starts(name, mixture):
    change, message = FAULTS[name]
    node = mixture()
    change(node)
    found = check(node)
    assert message in found[0]
    if name != "no field":
        assert len(found) == 1
    with pytest.raises(ValueError):
        open_stream(node, **SETTINGS)


def test_an_empty_source_is_one_message(mixture, source):
    node = mixture()
    node["sources"]["small"] = source("small")
    with open(node["sources"]["small"]["path"], "w"):
        pass
    (found,) = check(node)
    assert "small.jsonl is empty" in found and "data.sources.small.on_error=skip" in found


def test_a_memory_takes_no_mixture(mixture):
    (found,) = check(mixture(), lanes=True)
    assert "those of data=mixture come from different sources" in found
    with pytest.raises(ValueError, match="come from different sources"):
        open_stream(mixture(), lanes=True, **SETTINGS)


def test_a_cursor_of_another_mixture_or_a_broken_one_is_refused(mixture):
    stream = open_stream(mixture(), **SETTINGS)
    with pytest.raises(ValueError, match="belongs to other data"):
        open_stream(mixture({"large": 1, "middle": 1, "small": 1}), **SETTINGS).read(stream.start())
    cursor = stream.start()
    cursor["wished"]["small"] = float("nan")
    assert "is no finite number" in misfit(stream.start(), cursor)
