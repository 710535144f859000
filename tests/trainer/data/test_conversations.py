"""Conversations: only answers are learned, rows hold whole ones, and what is left out is told."""

import dataclasses
import gzip
import json
import re

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from pyarrow import parquet

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.feedforward import SwiGLU
from models.init import initialise
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.positions.rope import Rope
from models.span import GIVEN
from parallel.mesh import Axis, Mesh
from tests.support.chats import CHATS, chat, saved_tokenizer
from trainer.data.batch_sharding import BatchSharder
from trainer.data.open import check, open_stream
from trainer.data.whole_documents import best_fit

LENGTH = 96
SETTINGS = {"context_length": LENGTH, "rows": 1, "seed": 0}
ROWS = [
    {"messages": CHATS[0]},
    {"prompt": "2 + 2 = ", "completion": "4"},
    {"prompt": CHATS[1][:3], "completion": CHATS[1][3:]},
    {"text": "It is what it is."},
    {"messages": CHATS[2], "tools": [{"name": "add"}]},
]


@pytest.fixture
def node(tmp_path):
    """node(rows, **settings): a data=conversations node over a file of them."""

    def make(rows, name="chats.jsonl", **settings):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {
            "_target_": "trainer.data.sources.conversations.Conversations",
            "path": str(path),
            "tokenizer": str(saved_tokenizer(tmp_path / "tokenizer")),
            "cache": str(tmp_path / "cache"),
            "held_out": 0.0,
        } | settings

    return make


def epoch(stream):
    """The batches of an epoch, the cursor going through JSON."""
    cursor = stream.start()
    batches = []
    for _ in range(stream.batches):
        batch, cursor = stream.read(json.loads(json.dumps(cursor)))
        batches.append(batch)
    return batches


def learned(batches):
    """Text of the targets of each document, sorted; each document is whole in a row."""
    return sorted(_texts(batches))


def _texts(batches):
    for batch in batches:
        targets = batch.targets()
        for row in range(len(targets)):
            doc = batch.doc[row, :-1]
            for document in doc[doc >= 0].unique().tolist():
                picked = targets[row][doc == document]
                yield picked[picked != IGNORE].tolist()


def spelled(stream, texts):
    return sorted(stream.tokenizer.encode_markup(text)[0].tolist() for text in texts)


WANTED = [
    "It is 4.<|im_end|>",
    "4<|im_end|>",
    "It is.<|im_end|>",
    "t is what it is.<|im_end|>",
    "  {% raw %} <|im_end|>",
]


def test_the_targets_are_the_answers_with_their_ends_of_turn(node):
    stream = open_stream(node(ROWS), **SETTINGS)
    found = learned(epoch(stream))
    wanted = [*WANTED[:2], WANTED[2] + "Yes<|im_end|>", WANTED[4]]
    assert [ids for ids in found if ids in spelled(stream, wanted)] == spelled(stream, wanted)
    # Of plain text all but the first token is a target, and its end.
    (text,) = [ids for ids in found if ids not in spelled(stream, wanted)]
    whole = [*stream.tokenizer.encode(ROWS[3]["text"]), stream.tokenizer.end_of_text]
    assert text == whole[1:]


def test_every_token_is_learned_under_loss_on_all(node):
    stream = open_stream(node(ROWS, loss_on="all"), **SETTINGS)
    for batch in epoch(stream):
        assert (batch.role != GIVEN).all()
        same = (batch.doc[:, 1:] == batch.doc[:, :-1]) & (batch.doc[:, 1:] >= 0)
        assert torch.equal(batch.targets() != IGNORE, same)


def saved(rows, path):
    """The rows in files of every kind."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (path / "a.jsonl").write_bytes(lines)
    (path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (path / "c.jsonl.zst").write_bytes(bytes(pa.compress(lines, "zstd", asbytes=True)))
    fields = ("messages", "text")
    table = pa.Table.from_pylist([{field: row.get(field) for field in fields} for row in rows])
    parquet.write_table(table, path / "d.parquet", row_group_size=2)
    Dataset(table).save_to_disk(str(path / "e"))
    return [str(path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e")]


def test_every_kind_of_file_gives_the_same_conversations(node, tmp_path):
    rows = [ROWS[0], {"messages": CHATS[1]}, ROWS[3]]
    found = []
    for path in saved(rows, tmp_path):
        stream = open_stream(node(rows, path=path), **SETTINGS)
        found.append(learned(epoch(stream)))
    assert len(found) == 5 and found[0] and all(ids == found[0] for ids in found)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The cache of `datasets` holds the data set team/chats, fetched once; there is no network."""
    rows = [ROWS[0], {"messages": CHATS[1]}, ROWS[3]]
    (tmp_path / "chats").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "chats" / "train.jsonl").write_text(lines)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.load_dataset(str(tmp_path / "chats"))
    (tmp_path / "hf" / "chats").rename(tmp_path / "hf" / "team___chats")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return rows


def named(node, **settings):
    """The node of a data set by its name."""
    return {**node([]), "path": None, "name": "team/chats", **settings}


def test_a_data_set_that_was_fetched_once_is_read_by_its_name(node, kept, tmp_path):
    want = learned(epoch(open_stream(node(kept, "same.jsonl"), **SETTINGS)))
    stream = open_stream(named(node), **SETTINGS)
    assert want and learned(epoch(stream)) == want
    apart = named(node, held_out_path=str(tmp_path / "same.jsonl"))
    held_out = open_stream(apart, **(SETTINGS | {"split": "held_out"}))
    assert learned([held_out.read(held_out.start())[0]])


@pytest.mark.parametrize(
    "settings, part",
    [
        ({"name": "team/others"}, "data.name=team/others"),
        ({"split": "test"}, "split test) cannot be had"),
        ({"split": "train[:1%]"}, "is no split"),
        ({"name": 3}, "data.name=3 is no name"),
        ({"path": "x.jsonl"}, "one of the two is needed"),
        ({"name": None}, "one of the two is needed"),
        ({"name": None, "path": "x.jsonl", "subset": "a"}, "are of data.name"),
    ],
)
def test_a_name_that_cannot_be_had_is_one_message(settings, part, node, kept):
    with pytest.raises(ValueError, match=re.escape(part)):
        open_stream(named(node, **settings), **SETTINGS)


def test_rows_hold_whole_conversations_and_as_many_as_fit(node):
    rows = [{"messages": chat(f"question {n} " * (n % 3 + 1), "yes")} for n in range(40)]
    stream = open_stream(node(rows), **SETTINGS)
    batches = epoch(stream)
    sizes = []
    for batch in batches:
        for doc, pos in zip(batch.doc, batch.pos):
            for document in doc[doc >= 0].unique():
                positions = pos[doc == document]
                assert positions.tolist() == list(range(len(positions)))
                sizes.append(len(positions))
    assert sorted(sizes) == sorted(stream.corpus.lengths.tolist())
    assert stream.epoch_rows < 40 and stream.epoch_rows * (LENGTH + 1) < 1.3 * sum(sizes)
    assert "whole documents in every row" in stream.describe()


def test_epochs_and_seeds_mix_the_rows_and_a_resume_reads_on(node):
    rows = [{"messages": chat(f"question {n}", f"{n}")} for n in range(40)]
    stream = open_stream(node(rows), **SETTINGS)
    cursor = stream.start()
    batches = []
    for _ in range(2 * stream.batches):
        batches.append((cursor, stream.read(cursor)[0]))
        cursor = stream.read(cursor)[1]
    first = learned(batch for _, batch in batches[: stream.batches])
    assert first == sorted(spelled(stream, [f"{n}<|im_end|>" for n in range(40)]))
    together = [
        {str(row.tolist()) for _, batch in part for row in batch.tokens}
        for part in (batches[: stream.batches], batches[stream.batches :])
    ]
    assert not together[0] & together[1], "other conversations share a row in the next epoch"
    again = open_stream(node(rows), **SETTINGS)
    for cursor, batch in reversed(batches):
        assert torch.equal(again.read(cursor)[0].tokens, batch.tokens)
    other = open_stream(node(rows), **(SETTINGS | {"seed": 1}))
    assert not torch.equal(other.read(other.start())[0].tokens, batches[0][1].tokens)


def test_a_long_conversation_is_cut_at_turns_and_the_rest_is_counted(node):
    turns = [f"{role} {n} " * 4 for n in range(6) for role in ("ask", "say")]
    long_turn = chat("ask", "say " * 60, "x" * 300, "so")
    stream = open_stream(node([{"messages": chat(*turns)}, {"messages": long_turn}]), **SETTINGS)
    pieces = learned(epoch(stream))
    answers = [f"say {n} " * 4 + "<|im_end|>" for n in range(6)]
    wanted = [stream.tokenizer.encode_markup(answer)[0].tolist() for answer in answers]
    for answer in wanted:
        assert any(str(answer)[1:-1] in str(piece)[1:-1] for piece in pieces)
    total = sum(len(piece) for piece in pieces)
    others = [f"{'say ' * 60}<|im_end|>", "so<|im_end|>"]
    assert total == sum(len(ids) for ids in [*wanted, *spelled(stream, others)])
    described = stream.describe()
    assert "2 documents longer than a row are cut at turns" in described
    assert "1 of them within a turn" in described
    left_out = stream.cuts.left_out
    assert left_out and f"left out {left_out} tokens of pieces without an answer" in described
    kept = sum(stop - start for _, start, stop in stream.cuts.extents)
    assert kept + left_out >= stream.tokens


def test_a_memory_reads_conversations_on_from_row_to_row(node):
    stream = open_stream(node([{"messages": CHATS[1] * 3}]), **(SETTINGS | {"rows": 1}), lanes=True)
    targets = torch.cat([batch.targets() for batch in epoch(stream)], 1)
    answers = [f"{CHATS[1][n]['content']}<|im_end|>" for n in (1, 3, 5)] * 3
    wanted = stream.tokenizer.encode_markup("".join(answers))[0].tolist()
    assert targets[targets != IGNORE].tolist() == wanted


def tiny(vocabulary):
    mixers = [Attention(16, 2, 2, Rope()) for _ in range(2)]
    model = Decoder(vocabulary, 16, mixers, [SwiGLU(16, 24) for _ in mixers], init_std=0.2)
    return initialise(model, 5).double()


def gradient(model, batch):
    model.zero_grad()
    model(MicroBatch(batch.inputs(), batch.span(), batch.targets())).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_targets_of_prompts_have_exactly_no_influence(node):
    stream = open_stream(node([*ROWS, {"messages": long_chat()}]), **(SETTINGS | {"rows": 5}))
    batch, _ = stream.read(stream.start())
    model = tiny(stream.vocabulary)
    truth = gradient(model, batch)
    given = batch.targets() == IGNORE
    assert 0 < given.sum() < given.numel()
    # The model reads the same inputs; what follows a token without a target may be anything.
    targets = batch.targets().clone()
    spoilt = (batch.tokens[:, 1:] + 7) % stream.vocabulary
    seen = []
    plain = batch._replace(tokens=torch.where(batch.role == GIVEN, 0, batch.tokens))
    assert torch.equal(plain.targets(), targets)
    logits = model(MicroBatch(batch.inputs(), batch.span()))
    for chosen in (batch.tokens[:, 1:], torch.where(given, spoilt, batch.tokens[:, 1:])):
        losses = F.cross_entropy(logits.flatten(0, 1), chosen.flatten(), reduction="none")
        model.zero_grad()
        losses[~given.flatten()].sum().backward(retain_graph=True)
        seen.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*seen))
    for ours, by_hand in zip(truth, seen[0]):
        torch.testing.assert_close(ours, by_hand, rtol=1e-10, atol=1e-12)


def long_chat():
    return chat(*[f"turn {n}" for n in range(20)])


def sharder(batch, data, context, micro_batch):
    """The sharders of every rank."""
    for rank in range(data * context):
        mesh = dataclasses.replace(
            Mesh.alone(),
            world=Axis(size=data * context),
            data=Axis(rank // context, data),
            context=Axis(rank % context, context),
        )
        yield BatchSharder(
            mesh,
            rows=len(batch.tokens),
            context_length=LENGTH,
            micro_batch=micro_batch,
            policy="zigzag",
        )


@pytest.mark.parametrize("data, context, micro_batch", [(1, 1, 2), (3, 1, 1), (2, 3, 1), (4, 2, 2)])
def test_counts_of_answers_are_those_of_a_plain_loop(node, data, context, micro_batch):
    rows = [*ROWS, {"messages": long_chat()}]
    stream = open_stream(node(rows), **(SETTINGS | {"rows": 5}))
    batch, _ = stream.read(stream.start())
    wanted = []
    for row in range(5):
        for place in range(LENGTH):
            follows = (
                batch.doc[row, place] >= 0 and batch.doc[row, place] == batch.doc[row, place + 1]
            )
            if follows and batch.role[row, place + 1] != GIVEN:
                wanted.append(int(batch.tokens[row, place + 1]))
    found = []
    for share in sharder(batch, data, context, micro_batch):
        assert share.valid(batch) == len(wanted)
        for micro, _ in share(batch):
            found += micro.targets[micro.targets != IGNORE].tolist()
    assert sorted(found) == sorted(wanted)


FAULTS = {
    "no fields": ({"body": "x"}, "none of the fields messages, prompt with completion, or text"),
    "messages": ({"messages": "x"}, "lists of messages, or two texts, are needed"),
    "role": ({"messages": [{"content": "x"}]}, "message 1 is no object with a role"),
    "no answer": ({"messages": chat("only this")}, "no message of the role assistant to learn"),
    "completion": ({"prompt": "x", "completion": ""}, "has an empty completion"),
    "half": ({"prompt": "x"}, "lists of messages, or two texts, are needed"),
    "tools": ({"messages": CHATS[0], "tools": "x"}, "tools are not a list but str"),
    "mark": ({"text": "\ufdd0"}, "holds U+FDD0"),
    "turn": ({"messages": chat("<|im_end|>", "x")}, "spells the special token <|im_end|>"),
    "roles": ({"messages": [{"role": "assistant", "content": [1]}]}, "the chat template of"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_message_before_a_rank_starts_or_counted(name, node):
    row, message = FAULTS[name]
    (found,) = check(node([row, ROWS[0]]))
    assert message in found and "line 1" in found.replace("#1", " line 1")
    with pytest.raises(ValueError):
        open_stream(node([row, ROWS[0]]), **SETTINGS)
    stream = open_stream(node([row, ROWS[0]], on_error="skip"), **SETTINGS)
    assert stream.report.left_out == 1 and len(stream.documents) == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss_on": "some"}, "data.loss_on=some is unknown"),
        ({"chat_template": "none.jinja"}, "data.chat_template=none.jinja: No such file"),
        ({"tokenizer": "bytes"}, "data.tokenizer=bytes: it has no chat template"),
        ({"pad_vocabulary_to": 0}, "data.pad_vocabulary_to=0 is no number of tokens"),
    ],
)
def test_a_wish_that_cannot_be_honoured_is_one_message(node, settings, message):
    found = check(node(ROWS, **settings))
    assert len(found) == 1 and message in found[0]


def test_bytes_may_be_given_the_template_that_is_built_in(node):
    stream = open_stream(
        node([ROWS[0]], tokenizer="bytes", chat_template="chatml"),
        **(SETTINGS | {"context_length": 400}),
    )
    (ids,) = [ids for ids in learned(epoch(stream)) if ids]
    assert bytes(ids).decode() == "It is 4.<|im_end|>"


def test_a_padded_vocabulary_is_told_and_changes_no_row(node):
    plain = open_stream(node(ROWS), **SETTINGS)
    padded = open_stream(node(ROWS, pad_vocabulary_to=64), **SETTINGS)
    assert plain.vocabulary % 64 and padded.vocabulary == -(-plain.vocabulary // 64) * 64
    assert f"vocabulary {plain.vocabulary} padded to {padded.vocabulary}" in padded.describe()
    assert torch.equal(plain.read(plain.start())[0].tokens, padded.read(padded.start())[0].tokens)


def test_best_fit_fills_the_fullest_row_with_room():
    assert best_fit([7, 5, 4, 3, 3, 1], 10) == [[0, 3], [1, 2, 5], [4]]
    random = np.random.default_rng(3)
    lengths = sorted(random.integers(1, 51, 400).tolist(), reverse=True)
    bins = best_fit(lengths, 50)
    assert sorted(item for items in bins for item in items) == list(range(400))
    assert max(sum(lengths[item] for item in items) for items in bins) <= 50
    assert len(bins) <= 1.05 * sum(lengths) / 50
