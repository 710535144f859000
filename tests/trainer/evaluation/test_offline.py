"""scripts.evaluate gives the figures of training, on any ranks, and says what it cannot do."""

import json

import pytest

from scripts.evaluate import main
from tests.trainer.evaluation.test_assessment import went, words  # noqa: F401
from trainer.export import export
from trainer.preflight.prepare import load_config
from trainer.run_dir import record

CHOICE = (
    "evaluation=[heldout,recall]",
    "evaluation.recall.lengths=[40]",
    "evaluation.recall.pairs=4",
    "evaluation.recall.examples=3",
)


@pytest.fixture
def finished(tmp_path, words):  # noqa: F811
    """A run that evaluated recall itself, and its export."""
    run = tmp_path / "run"
    more = (*CHOICE, "evaluation.sample_tokens=0", "steps=2")
    assert went(run, words, *more)[0] == 0
    record(run, load_config((*words, *more)))
    export(run, tmp_path / "export")
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    return run, tmp_path / "export", {row["name"]: row["value"] for row in rows}


def test_a_run_and_its_export_have_the_figures_of_training_on_any_ranks(finished, tmp_path, capsys):
    run, exported, wanted = finished
    path = tmp_path / "rows.jsonl"
    assert main([str(run), str(exported), *CHOICE, "evaluation.batches=2", f"json={path}"]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["model"] for row in rows] == [str(run)] * 4 + [str(exported)] * 4
    for row in rows:
        assert row["value"] == pytest.approx(wanted[row["name"]], abs=1e-9) and row["step"] == 2
    printed = capsys.readouterr().out
    assert "recall/accuracy" in printed and "0.2500" in printed
    shared = [str(exported), *CHOICE, "evaluation.batches=2", "parallel.context=3", "json=-"]
    assert main(shared) == 0
    for line in capsys.readouterr().out.splitlines():
        row = json.loads(line)
        assert row["value"] == pytest.approx(wanted[row["name"]], abs=1e-9)


def test_what_cannot_be_honoured_is_one_message(tmp_path, finished, capsys):
    run = str(finished[0])
    for words, message in (  # noqa: F402
        ([], "a model is wanted"),
        ([str(tmp_path / "none")], "there is no such directory"),
        ([str(tmp_path)], "is no run directory"),
        ([run, "model.width=3"], "a finished model keeps its own settings"),
        ([run, "evaluation=[nedle]"], "there is no evaluation of that name; did you mean"),
        ([run, "evaluation=recall", "evaluation.recall.lengths=[8]"], "8 pairs and as many"),
        ([run, "context_length=x"], "context_length=x"),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.strip().splitlines()) == 1, said
