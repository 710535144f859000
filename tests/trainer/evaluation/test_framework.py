"""Evaluations by name: chosen on the command line, logged with chance, owed after a signal, and
refused in one message each before a rank starts."""

import json

import pytest

from tests.trainer.evaluation.test_assessment import COMMON, went, words  # noqa: F401
from trainer.config.compose import compose
from trainer.errors import DONE, UserError
from trainer.preflight.prepare import load_config

MINE = "evaluation.mine._target_=tests.support.evaluations.TokenCount"
SMALL = ("steps=2", "model.width=16", "model.layers=1", "model.heads=2")


def rows(directory):
    return [json.loads(line) for line in (directory / "evaluation.jsonl").read_text().splitlines()]


def test_a_class_of_the_user_is_logged_with_chance_and_the_same_on_three_ranks(tmp_path, words):  # noqa: F811
    alone = tmp_path / "alone"
    shared = tmp_path / "shared"
    assert went(alone, words, MINE, "evaluation.mine.every=4")[0] == DONE
    code, said = went(shared, words, MINE, "parallel.context=3", size=3)
    assert code == DONE and "mine/share" in said and "(chance 0.5000)" in said
    assert "evaluation: " in said and "of this run's time (held_out" in said
    own = [row for row in rows(shared) if row.get("part") == "mine"]
    assert [row["step"] for row in own] == [2, 4]
    assert [row for row in rows(alone) if row.get("part") == "mine"] == own[1:]
    assert own[0]["name"] == "mine/share" and own[0]["done"] and own[0]["chance"] == 0.5
    assert own[0]["cells"][0]["below"] == 100


def test_a_signal_within_it_leaves_it_owed_and_its_rows_once(tmp_path, words):  # noqa: F811
    cut = tmp_path / "cut"
    more = (MINE, f"evaluation.mine.signal_once={tmp_path / 'file'}", "parallel.context=3")
    code, said = went(cut, words, *more, size=3)
    assert code == 143 and "owed: mine of step 2" in said
    assert went(cut, words, *more, size=3)[0] == DONE
    steps = [(row["step"], row["name"]) for row in rows(cut)]
    assert steps == [
        (2, "held_out_loss"),
        (2, "mine/share"),
        (4, "held_out_loss"),
        (4, "mine/share"),
    ]


def test_without_heldout_only_the_others_run(tmp_path, words):  # noqa: F811
    alone = tmp_path / "alone"
    only = ("~evaluation.heldout", MINE, "evaluation.sample_tokens=0")
    assert went(alone, words, *only)[0] == DONE
    assert {row["name"] for row in rows(alone)} == {"mine/share"}


def test_an_old_record_evaluates_the_held_out_loss():
    config = compose(SMALL).config
    tree = config.model_dump(by_alias=True)
    del tree["evaluation"]["heldout"]
    assert list(type(config).model_validate(tree).evaluation.nodes) == ["heldout"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "evaluation.evry=3",
            "evaluation.evry=3: there is no such setting; did you mean evaluation.every?",
        ),
        ("evaluation=[heldot]", "did you mean evaluation=heldout?"),
        ("evaluation=[]", "evaluation=[]: the list is empty"),
        ("evaluation.nothing.length=3", "no evaluation nothing is chosen"),
        ("evaluation.heldout.lenth=3", "did you mean evaluation.heldout.length?"),
        ("evaluation.sample._target_=a.B", "evaluation.sample: this name is taken"),
        (
            "evaluation=[heldout,needle] evaluation.needle.lengths=[100]",
            "evaluation.needle.lengths=[100]: a row of 100 tokens has no room for needles",
        ),
        (
            "evaluation=[heldout,needle] evaluation.needle.lengths=[4096] position=learned",
            "a row of 4096 tokens is longer than Learned (max_length=2048) allows",
        ),
        (
            "evaluation=[heldout,needle] evaluation.needle.generate=8 data=recall",
            "evaluation=needle: it reads and writes text, but the run's data is a task",
        ),
        (
            "evaluation=[heldout,recall] data=recall",
            "evaluation=recall: it scores the next token, but the answers",
        ),
        (
            "evaluation=[heldout,copy] objective=masked mixer=bidirectional",
            "evaluation=copy: it scores the next token, which objective=masked does not teach",
        ),
        (
            "evaluation=[heldout,tasks] evaluation.tasks.task=recal",
            "evaluation.tasks.task=recal: there is no task of that name; did you mean recall?",
        ),
        (
            "evaluation=[heldout,tasks]",
            "evaluation.tasks.task=null: Stdlib is text",
        ),
        (
            "evaluation=[heldout,tasks] evaluation.tasks.task=recall evaluation.tasks.across=pairs",
            "evaluation.tasks: across and across_values belong together",
        ),
        (
            "evaluation=[heldout,in_context] evaluation.in_context.late=3000",
            "evaluation.in_context.late=3000: a row holds the tokens 0 to 2047",
        ),
        (
            "evaluation.mine._target_=trainer.progress.Progress +evaluation.mine.cursor={}",
            "it is no evaluation",
        ),
    ],
)
def test_bad_input_is_one_message(setting, message):
    with pytest.raises(UserError) as refused:
        load_config((*SMALL, *setting.split()))
    assert message in str(refused.value) and len(str(refused.value).splitlines()) == 1
