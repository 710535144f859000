"""The tasks of the Neural Turing Machine say what the paper says, and nothing of an answer is
shown."""

import numpy as np
import pytest

from models.loss import IGNORE
from trainer.data.tasks.associative import Associative
from trainer.data.tasks.copy import CopyTask
from trainer.data.tasks.repeat_copy import RepeatCopy
from trainer.data.tasks.sort import Sort

BITS = 3
START, END, BLANK = 8, 9, 10
TASKS = {
    "copy": CopyTask(min_length=2, max_length=5, bits=BITS),
    "repeat_copy": RepeatCopy(min_length=1, max_length=4, min_repeats=2, max_repeats=3, bits=BITS),
    "associative": Associative(min_items=2, max_items=4, vectors_each=2, bits=BITS),
    "sort": Sort(min_length=3, max_length=5, levels=7, bits=BITS),
    "sort, some kept": Sort(min_length=3, max_length=5, kept=2, levels=7, bits=BITS),
}


def examples(task, count=200):
    random = np.random.default_rng(0)
    return [task.example(random) for _ in range(count)]


def parts(example):
    """(question, answer) of an example, after a look at its frame."""
    tokens, targets = example.tokens.tolist(), example.targets.tolist()
    end = tokens.index(END)
    answer = targets[end:]
    assert tokens[0] == START and tokens[end + 1 :] == [BLANK] * (len(answer) - 1)
    assert targets[:end] == [IGNORE] * end and IGNORE not in answer
    return tokens[1:end], answer


def wanted(name, question):
    """The answer, worked out from the question alone."""
    if name == "copy":
        return question
    if name == "repeat_copy":
        *shown, mark = question
        return shown * (mark - BLANK) + [END]
    if name == "associative":
        item, asked = 11, 12
        place = question.index(asked)
        items = [question[i + 1 : i + 3] for i in range(0, place, 3)]
        assert question[0:place:3] == [item] * len(items)
        return items[items.index(question[place + 1 :]) + 1]
    pairs = sorted(zip(question[0::2], question[1::2]), reverse=True)
    return [vector for _, vector in pairs][: 2 if "kept" in name else None]


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_follows_from_the_question(name):
    task, sizes = TASKS[name], set()
    for example in examples(task):
        question, answer = parts(example)
        assert answer == wanted(name, question)
        assert example.tokens.max() < task.vocabulary
        sizes.add(len(example.tokens))
    assert max(sizes) == task.longest and len(sizes) > 2


def test_all_sizes_are_drawn():
    assert {len(parts(each)[0]) for each in examples(TASKS["copy"])} == {2, 3, 4, 5}
    assert {len(parts(each)[0]) // 2 for each in examples(TASKS["sort"])} == {3, 4, 5}


def test_priorities_and_items_are_never_the_same_twice():
    for example in examples(TASKS["sort"]):
        marks = parts(example)[0][0::2]
        assert len(set(marks)) == len(marks)
    for example in examples(TASKS["associative"]):
        items = [
            tuple(parts(example)[0][i + 1 : i + 3]) for i in range(0, len(parts(example)[0]) - 3, 3)
        ]
        assert len(set(items)) == len(items)


def test_wrong_bits_are_counted_over_vectors_and_a_mark_in_their_place_is_all_wrong():
    grade = TASKS["repeat_copy"].grade(
        np.array([0b101, 0b011, END, 0b000, END]), np.array([0b101, 0b101, 0b001, END, END])
    )
    assert grade == {"accuracy": (2, 5), "wrong_bits": (0 + 2 + 3, 9)}
    assert TASKS["copy"].grade(np.array([], int), np.array([], int)) == {
        "accuracy": (0, 0),
        "wrong_bits": (0, 0),
    }


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: CopyTask(min_length=4, max_length=3),
            "data.min_length=4 is above data.max_length=3; use data.max_length=4",
        ),
        (lambda: CopyTask(min_length=0), "data.min_length=0 is no whole number from 1 on"),
        (lambda: CopyTask(bits=20), "data.bits=20 .* at most 12"),
        (lambda: CopyTask(per_row=0), "data.per_row=0"),
        (lambda: CopyTask(held_out=1.0), "held_out=1.0"),
        (lambda: RepeatCopy(max_repeats=True), "data.max_repeats=True"),
        (lambda: Associative(min_items=1), "data.min_items=1 is no whole number from 2 on"),
        (lambda: Associative(bits=1, vectors_each=1), "cannot all differ"),
        (lambda: Sort(levels=4), "levels=8"),
        (lambda: Sort(min_length=3, kept=4), "kept=3"),
    ],
)
def test_settings_that_make_no_task_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
