"""A Hugging Face folder stands where a run or an export is expected: scripts.generate, evaluate."""

import json

import pytest
import tokenizers
import torch
import transformers
from torch.nn import functional as F

from scripts import evaluate, generate
from tests.support import hub
from trainer.init_from.hub_folder import is_hub_folder
from trainer.library.load import load

WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ran", "far"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Mixtral with a tokenizer of words, tied so that a name has an alias."""
    folder = tmp_path_factory.mktemp("hf")
    settings = {**hub.SMALL_MIXTRAL, "tie_word_embeddings": True, "vocab_size": 12}
    hub.make("MixtralConfig", settings, folder)
    vocabulary = {word: number for number, word in enumerate([*WORDS, "<eos>", "?"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_generate_goes_on_with_the_tokens_of_the_folder(folder, tmp_path):
    assert is_hub_folder(folder) and not is_hub_folder(tmp_path)
    words = [str(folder), "prompt=the cat sat", "tokens=12", "temperature=0"]
    assert generate.main([*words, f"output={tmp_path / 'out.jsonl'}"]) == 0
    row = json.loads((tmp_path / "out.jsonl").read_text())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    want = theirs.generate(
        torch.tensor([[0, 1, 2]]),
        attention_mask=torch.ones(1, 3, dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=8,
    )
    names = [*WORDS, "<eos>", "?"]
    told = [names[token] if token < len(names) else "" for token in want[0, 3:].tolist()]
    assert row["text"].split() == [word for word in told if word and word != "<eos>"]


def test_evaluate_gives_the_loss_of_transformers(folder, tmp_path, capsys):
    generator = torch.Generator().manual_seed(4)
    lines = []
    for _ in range(40):
        picked = torch.randint(len(WORDS), (11,), generator=generator).tolist()
        lines.append(" ".join(WORDS[number] for number in picked))
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "the cat"}) + "\n")
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    words = [
        "data=files",
        f"data.path={tmp_path / 'train.jsonl'}",
        f"data.held_out_path={held_out}",
        f"data.tokenizer={folder}",
        f"data.cache={tmp_path / 'cache'}",
        "context_length=12",  # a document and its end
        "batch_tokens=96",
        "evaluation=heldout",
        "evaluation.batches=5",
        "json=-",
    ]
    assert evaluate.main([str(folder), *words]) == 0
    figures = {}
    for line in capsys.readouterr().out.splitlines():
        row = json.loads(line)
        figures[row["name"]] = row["value"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    total = 0.0
    for line in lines:
        tokens = torch.tensor([[WORDS.index(word) for word in line.split()] + [8]])
        logits = theirs(tokens).logits[0, :-1]
        total += F.cross_entropy(logits, tokens[0, 1:], reduction="mean").item() / len(lines)
    assert any(abs(value - total) < 1e-5 for value in figures.values()), (figures, total)


def test_settings_that_a_folder_does_not_have_are_one_message(folder, tmp_path, capsys):
    assert evaluate.main([str(folder), "model.width=3"]) == 2
    assert "a finished model keeps its own settings" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "lama"}))
    assert generate.main([str(broken)]) == 2
    assert "model_type='lama', which no adapter reads" in capsys.readouterr().err


def test_a_table_of_positions_may_be_shorter_than_the_usual_row(tmp_path):
    hub.make("GPT2Config", {**hub.SMALL_GPT2, "n_positions": 100}, tmp_path)
    assert load(tmp_path).config.context_length == 100
