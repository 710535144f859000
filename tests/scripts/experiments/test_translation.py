"""The recipe of translation: equal time, grades of texts, and one message for each mistake."""

import sys

import pytest

from scripts.experiments.__main__ import effort, main
from scripts.experiments.libreoffice_pairs import Pair, write
from scripts.experiments.translation import bleu
from scripts.experiments.trial import HELD_OUT, Trial, run_trial

TINY = (
    "model=seq2seq",
    "model.width=16",
    "data=reverse",
    "data.max_length=5",
    "data.per_row=1",
    "context_length=6",
    "batch_tokens=48",
    "evaluation.batches=1",
)


def lengths(written, wanted):
    """A grade that shows what it was given."""
    assert all(text.replace(" ", "").isdigit() for text in wanted)
    return {"answers": len(written), "symbols": sum(len(text.split()) for text in wanted)}


def test_texts_are_graded_and_training_ends_with_its_time():
    trial = Trial("tiny", (*TINY, "steps=100000", "schedule=constant"), {}, 0.5, lengths)
    found = run_trial(trial, seed=0)
    assert 0 < len(found.rows) < 5000
    graded = found.exams[HELD_OUT].graded
    assert graded["answers"] > 0 and 4 <= graded["symbols"] / graded["answers"] <= 5
    assert 0 <= graded["token_accuracy"] <= 1


def test_bleu_is_100_of_the_same_texts_and_0_of_others():
    texts = ["Klicken Sie hier auf OK.", "Das ist ein anderer kurzer Satz."]
    assert bleu(texts, texts)["bleu"] == pytest.approx(100)
    assert bleu(["nothing alike at all"] * 2, texts)["bleu"] < 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["translation"], "pairs= is not set"),
        (["translation", "pairs=/nowhere"], "pairs=/nowhere: train.jsonl is not there"),
        (["sets", "pairs=/nowhere"], "pairs=/nowhere: there is no such setting"),
        (["translation", "run=/nowhere"], "run=/nowhere: there is no such setting"),
    ],
)
def test_each_mistake_gives_one_message(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_missing_package_is_one_message(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.delitem(sys.modules, "scripts.experiments.translation")
    assert main(["translation", "pairs=/nowhere"]) == 2
    assert "the package sacrebleu is not installed" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.slow
def test_the_recipe_prints_a_table_of_four_models(tmp_path, capsys):
    pairs = []
    for number in range(60):
        pairs.append(Pair(f"choose the item {number}", f"Wählen Sie den Eintrag {number}"))
    write(pairs, tmp_path, 0.2, 300)
    assert main(["translation", f"pairs={tmp_path}", "seeds=1", "jobs=1", "steps=2"]) == 0
    printed = capsys.readouterr().out
    for name in ("no attention", "Bahdanau", "Luong, general", "Transformer"):
        assert f"| {name}" in printed
    assert effort([f"pairs={tmp_path}"], recipe="translation").pairs == str(tmp_path)
